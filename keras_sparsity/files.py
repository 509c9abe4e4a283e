"""Files that are put in place whole, or not at all, and small ones."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib

# Keras takes a larger member that is compressed more than a hundred times for an attack
# on the memory of who loads it. (What it loads without extracting may be 4 GiB.)
_LARGE, _FARTHEST = 2**28, 90

_UNFINISHED = "unfinished-"


@contextlib.contextmanager
def written_whole(path):
    """Gives a path to write to, and puts the file in the place of `path` at the end.

    Whatever ends the writing early, a crash or a full disk, leaves what was there. The
    new file has the permissions of the old one; of a link, the target is replaced.
    """
    target = path.resolve()
    try:
        # A folder of its own: other files, and other writers, may have any name.
        with tempfile.TemporaryDirectory(
            prefix=_UNFINISHED, dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            beside = pathlib.Path(folder, path.name)
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, beside)
            os.replace(beside, target)
    except OSError as error:
        raise OSError(
            f"'{path}' could not be written; what was written before is intact. "
            f"Received: {error}"
        ) from error


def remove_unfinished(directory):
    """Removes what `written_whole` has left in `directory` when it was killed."""
    for folder in directory.glob(f"{_UNFINISHED}*/"):
        shutil.rmtree(folder)


def read_archive(file):
    """What a zip archive holds, as `{name: bytes}`."""
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(file, members, compression=zipfile.ZIP_DEFLATED, level=None):
    """Writes the zip archive of `{name: bytes}`, compressed.

    By default by deflate, which every Python has: bzip2 makes sparse models a sixth
    smaller, but takes two to three times as long to read, for dense ones ten times, and
    is missing from some builds of Python; LZMA is larger than bzip2 and takes twenty
    times as long to write. `examples/benchmarks/file_size.py` measures them.
    """
    with zipfile.ZipFile(file, "w", compression, compresslevel=level) as archive:
        for name, content in members.items():
            stored = zipfile.ZIP_STORED if _is_refused(content) else None
            archive.writestr(name, content, stored)


def _is_refused(content):
    """Whether Keras would not read `content` where it is compressed."""
    if len(content) <= _LARGE:
        return False
    return len(content) > _FARTHEST * len(zlib.compress(content))
