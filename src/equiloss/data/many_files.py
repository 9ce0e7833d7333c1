"""What is done to many files: several at a time where that helps, and with a bar where it lasts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

# Files that are done one by one, and the seconds for each from which on threads do the others.
TRIED, SLOW, THREADS = 32, 0.005, 16
# Seconds until a bar shows how far it is.
PATIENCE = 2.0

_T = TypeVar("_T")


def of_each(function: Callable[[Path], _T], files: Sequence[Path]) -> Iterator[_T]:
    """A function of each file, in order; in threads where each takes long.

    Most of that is waiting or decoding, which threads do side by side. Of small files on a disk
    of one's own they do half as many as one alone.
    """
    tried, others = files[:TRIED], files[TRIED:]
    spent = 0.0
    for file in tried:
        began = time.monotonic()
        done = function(file)
        spent += time.monotonic() - began  # without what is made of it
        yield done
    if spent < SLOW * len(tried):
        yield from map(function, others)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(function, others)


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
