"""Fifty runs in one process leave no file, thread, process or shared memory open."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from support import PYTHONPATH, TESTS, composed, fuzz

SMALL = (
    *("callbacks=quiet", "logger=tensorboard", "data=synthetic", "data.options.num_samples=60"),
    *("model=mlp", "model.options.widths=[4]", "trainer.max_epochs=2", "parity.every_n_steps=1"),
    *("data.batch_size=20", "trainer.threads=1"),
)
KINDS = ("whole", "workers", "failed", "interrupted", "refused")


def one(kind: str, directory: Path) -> None:
    """Do a run that ends as its kind says."""
    from equiloss.distributed.interruption import Interrupted
    from equiloss.errors import UserError
    from equiloss.run import run
    from training.test_resume import SignalAt, StopBefore, StopError

    if kind == "workers":
        run(composed(*SMALL, "data.num_workers=2"), directory)
    elif kind == "failed":
        with pytest.raises(StopError):
            run(composed(*SMALL), directory, callbacks=[StopBefore(2)])
    elif kind == "interrupted":
        stop = SignalAt("on_train_batch_end", 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(composed(*SMALL), directory, callbacks=[stop])
    elif kind == "refused":
        with pytest.raises(UserError):
            run(composed(*SMALL, "optimizer.options.momentum=-1"), directory)
    else:
        run(composed(*SMALL), directory)


def held() -> dict[str, list[str]]:
    """What this process holds: open files, threads, processes, and files of shared memory."""
    gc.collect()
    # But for the directory that is being listed.
    places = list(Path("/proc/self/fd").iterdir())
    files = [str(place.readlink()) for place in places if place.is_symlink()]
    children = Path("/proc/self/task").glob("*/children")
    return {
        "files": sorted(files),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "of the system": sorted(place.name for place in Path("/proc/self/task").iterdir()),
        "processes": sorted(pid for file in children for pid in file.read_text().split()),
        "shared memory": sorted(
            place.name for place in Path("/dev/shm").iterdir() if _is_left(place.name)
        ),
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
    }


def _is_left(name: str) -> bool:
    """Whether a file of shared memory is ours, or of a process that is no more."""
    found = re.match(r"torch_(\d+)_", name)
    return found is not None and (
        int(found[1]) == os.getpid() or not Path(f"/proc/{found[1]}").exists()
    )


def main(runs: int, warm: int) -> None:
    """Do some runs, and end with what is held after the last and was not after the first few."""
    before = None
    with tempfile.TemporaryDirectory() as place:
        for number in range(runs):
            one(KINDS[number % len(KINDS)], Path(place) / str(number))
            if number + 1 == warm:
                before = held()
    after = held()
    assert before is not None
    grown = {
        what: (len(before[what]), names)
        for what, names in after.items()
        if len(names) != len(before[what])
    }
    if grown:
        sys.exit(f"after {warm} runs and after {runs}: {grown}")


@pytest.mark.parametrize("runs", [pytest.param(50, marks=fuzz)])
def test_many_runs_leave_nothing_open(runs: int) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c"),
            f"from fuzz.test_leaks import main; main({runs}, 10)",
        ],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
