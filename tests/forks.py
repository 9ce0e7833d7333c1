"""Runs of `train.py` as forks of a server that has imported everything and computed nothing.

An interpreter that imports torch takes seconds; five hundred of them would take the hour that the
runs themselves do not need.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from equiloss.distributed import interruption
from support import ROOT

# Whatever a run opens, renames or removes passes one of them.
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")
OUTPUT = "output.txt"

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["equiloss.run", "equiloss.launching.command", "equiloss.records.tensorboard", __name__]
)


def begin(
    directory: Path, *arguments: str, kill_at: int | None = None, count: Any = None
) -> BaseProcess:
    """Start a run.

    Args:
        directory: Its run directory; its output is added to a file beside it.
        arguments: Its overrides.
        kill_at: SIGKILL it when so many file events have happened in its directory.
        count: A shared integer that counts them instead.
    """
    process = server.Process(target=_train, args=(directory, arguments, kill_at, count))
    process.start()
    return process


def output_of(directory: Path) -> str:
    """What the runs in a directory have printed."""
    return (directory.parent / OUTPUT).read_text()


def _train(directory: Path, arguments: tuple[str, ...], kill_at: int | None, count: Any) -> None:
    os.setsid()
    # A test that was stopped leaves no run behind.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in interruption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (directory.parent / OUTPUT).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(directory.parent)
    sys.argv = [str(ROOT / "train.py"), *arguments, f"hydra.run.dir={directory}"]
    if kill_at is not None or count is not None:
        _watch_files(str(directory), kill_at, count)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _watch_files(directory: str, kill_at: int | None, count: Any) -> None:
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(directory):
            return
        seen += 1
        if count is not None:
            count.value = seen
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
