"""Files that are put in place whole, or not at all."""

import contextlib
import os


@contextlib.contextmanager
def written_whole(path):
    """Gives a path to write to, and puts the file in the place of `path` at the end.

    Whatever ends the writing early, a crash or a full disk, leaves what was there.
    """
    beside = path.with_name(f"unfinished{path.suffix}")
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
