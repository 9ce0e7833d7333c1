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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from equiloss.distributed import interruption
from support import ROOT

# Whatever a run opens, renames or removes passes one of them.
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")
OUTPUT = "output.txt"

server = multiprocessing.get_context("forkserver")
# What a process that has started has imported: the name of this module comes last, since it makes
# the server that imports it.
PRELOAD = ["equiloss.run", "equiloss.launching.command", "equiloss.records.tensorboard", __name__]
server.set_forkserver_preload(PRELOAD)


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


def completed(
    arguments: Sequence[str], *, cwd: Path, timeout: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `train.py` to its end, as `subprocess.run` would.

    Raises:
        TimeoutExpired: if it takes longer; it is then killed, with all that it has started.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = server.Process(target=_completed, args=(arguments, cwd, environment, files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired([*arguments], timeout)
        stdout, stderr = (file.read_text() for file in files)
    return subprocess.CompletedProcess([*arguments], process.exitcode, stdout, stderr)


def _completed(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], files: Sequence[Path]
) -> None:
    _begin_anew()
    _print_to(*(file.open("w") for file in files))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    os.chdir(cwd)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:  # as an interpreter ends
        traceback.print_exc()
        sys.exit(1)


def output_of(directory: Path) -> str:
    """What the runs in a directory have printed."""
    return (directory.parent / OUTPUT).read_text()


def _train(directory: Path, arguments: tuple[str, ...], kill_at: int | None, count: Any) -> None:
    _begin_anew()
    with (directory.parent / OUTPUT).open("a") as file:
        _print_to(file, file)
    os.chdir(directory.parent)
    sys.argv = [str(ROOT / "train.py"), *arguments, f"hydra.run.dir={directory}"]
    if kill_at is not None or count is not None:
        _watch_files(str(directory), kill_at, count)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _begin_anew() -> None:
    """Be in a session of one's own, with the signals of a shell's child."""
    os.setsid()
    # A test that was stopped leaves no run behind.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in interruption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _print_to(stdout: IO[str], stderr: IO[str]) -> None:
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    # Streams that are replaced would be taken for somebody else's.
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]


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
