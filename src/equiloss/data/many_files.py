"""What is done to many files: asked for ahead, in threads where that helps, and with a bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

# Files that are done one by one, and the seconds for each from which on threads do the others.
TRIED, SLOW, THREADS = 32, 0.005, 16
# Files whose first bytes a disk is asked for before their turn: it serves many at once faster.
AHEAD, BYTES = 64, 2**15
# Seconds until a bar shows how far it is.
PATIENCE = 2.0

_T = TypeVar("_T")


def of_each(function: Callable[[Path], _T], files: Sequence[Path]) -> Iterator[_T]:
    """A function of each file, in order; in threads where each takes long.

    Most of that is waiting or decoding, which threads do side by side. Of small files on a disk
    of one's own they do half as many as one alone.
    """
    ahead = _asked_for(files)
    spent = 0.0
    for file in islice(ahead, TRIED):
        began = time.monotonic()
        done = function(file)
        spent += time.monotonic() - began  # without what is made of it
        yield done
    if spent < SLOW * TRIED:
        yield from map(function, ahead)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(function, files[TRIED:])


def _asked_for(files: Sequence[Path]) -> Iterator[Path]:
    """The files, each but the first asked of its disk ahead, where the system can be asked."""
    advise = getattr(os, "posix_fadvise", None)
    for number, file in enumerate(files):
        if advise is not None and number + AHEAD < len(files):
            with suppress(OSError, ValueError):  # whoever reads it says so
                handle = os.open(files[number + AHEAD], os.O_RDONLY)
                try:
                    advise(handle, 0, BYTES, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)
        yield file


def shown(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """The items one by one, with a bar on a terminal where that takes long."""
    began = time.monotonic()
    shows = sys.stderr.isatty()
    with ExitStack() as stack:
        bar: Progress | None = None
        for number, item in enumerate(items):
            if shows and bar is None and time.monotonic() - began > PATIENCE:
                console = Console(stderr=True)
                bar = stack.enter_context(Progress(console=console, transient=True))
                bar.add_task(what, total=total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=number)
            yield item
