"""Files that are put in place whole, or not at all, and small ones."""

import contextlib
import os
import zipfile


@contextlib.contextmanager
def written_whole(path):
    """Gives a path to write to, and puts the file in the place of `path` at the end.

    Whatever ends the writing early, a crash or a full disk, leaves what was there.
    """
    beside = path.with_name(f"unfinished-{path.name}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"'{path}' could not be written; what was written before is intact. "
                f"Received: {error}"
            ) from error
        raise


def write_archive(file, members):
    """Writes the zip archive of `{name: bytes}`, compressed.

    With deflate: bzip2 makes sparse models a sixth smaller, but takes five times as
    long to read, which only a slow network makes up for; LZMA is between the two and
    takes twenty times as long to write. `examples/benchmarks/file_size.py` measures it.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
