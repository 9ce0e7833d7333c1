"""Standard output and error that a process can do without: `train.log` has what they show."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from typing import Any


def make_optional() -> None:
    """Let nothing that becomes of standard output and error end this process or its children.

    A reader that has gone, a full disk, a closed descriptor, or an encoding that lacks a character
    then costs no more than what would have been shown.
    """
    # A log that cannot be written would otherwise cost a traceback for each of its lines.
    logging.raiseExceptions = False
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # replaced already, here or by somebody else
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        descriptor = _null(number) if stream is None else number
        text = io.TextIOWrapper(
            io.BufferedWriter(_Lossy(descriptor, "w", closefd=False)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",
            # An unbuffered stream, of `python -u`, writes through.
            line_buffering=stream is None or stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, text)


class _Lossy(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: Any, /) -> int:  # a buffer of any type
        try:
            written = super().write(data)
        except OSError:
            written = None
        # None, too, of a descriptor that does not block and takes nothing now.
        return memoryview(data).nbytes if written is None else written


def _null(number: int) -> int:
    """Open a descriptor that takes everything in the place of a closed one.

    A file that is opened later would get its number, and with it what libraries print.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    while null < number:  # standard input is closed too
        null = os.open(os.devnull, os.O_WRONLY)
    os.set_inheritable(null, True)
    return null
