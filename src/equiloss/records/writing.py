"""What the operating system says of a file that cannot be written, in one line for a user."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equiloss.errors import UserError

ELSEWHERE = "name another directory with hydra.run.dir=… (of a sweep: hydra.sweep.dir=…)"
WAYS_OUT = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


class FileError(UserError):
    """A file or directory that cannot be written."""


@contextmanager
def writing(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Name the file that is being written while the context lasts, if it cannot be.

    A full disk names none, and a library that writes may hide the disk's error behind its own.

    Args:
        path: The file.
        elsewhere: How to name another place: by default, that of a run.

    Raises:
        FileError: where the operating system has refused something, whatever was made of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise FileError(refusal(cause, path, elsewhere)) from error


def refusal(error: OSError, path: Path | None = None, elsewhere: str = ELSEWHERE) -> str:
    """One line: what cannot be written or, where no `path` is known, used; why; and the way out.

    >>> refusal(OSError(errno.ENOSPC, ""), Path("runs/1/results.json"))
    'cannot write runs/1/results.json: no space left on device: make room there'
    """
    culprit = error.filename or "a file"
    # A file beside its place is none of the user's business, a directory above it is.
    if path is not None and culprit not in map(str, path.parents):
        culprit = path
    if error.errno == errno.ENOTDIR:
        culprit = next((place for place in Path(culprit).parents if place.is_file()), culprit)
    number = error.errno or 0
    verb = "use" if path is None else "write"
    way_out = WAYS_OUT.get(number, elsewhere)
    return f"cannot {verb} {culprit}: {os.strerror(number).lower()}: {way_out}"
