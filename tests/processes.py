"""Runs of `train.py` in processes of their own, to which something is done while they train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from equiloss.distributed import interruption
from equiloss.records.run_dir import METRICS
from support import PYTHONPATH, ROOT

# Twelve steps of 0.2 s, and a checkpoint after every second one.
SLOW = (
    "callbacks=quiet",
    "logger=csv",
    "parity=off",
    "model=custom",
    "model.target=stand_ins:slow",
    "trainer.max_steps=12",
    "trainer.threads=1",
    "checkpoint.every_n_steps=2",
)


def start(
    directory: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    redirected: str = "",
) -> subprocess.Popen[str]:
    """Start a run in a session of its own, as from a shell with default signals."""

    def before() -> None:
        # A shell may have started these tests in its background, or under nohup.
        for number in interruption.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        prepare()

    command = [sys.executable, str(ROOT / "train.py"), *SLOW, *arguments]
    if not any(argument.startswith("hydra.run.dir") for argument in arguments):
        command.append(f"hydra.run.dir={directory}")
    if redirected:
        command = ["bash", "-c", f'exec "$@" {redirected}', "bash", *command]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=before,
        cwd=directory.parent,
    )


# A sweep of two jobs, of eight steps of 0.2 s each.
BOTH = "loss=softmax_nll,cross_entropy"
SLOW_STEPS = (*(word for word in SLOW if "max_steps" not in word), "trainer.max_steps=8")


def start_sweep(sweep_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a sweep over two losses."""
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "train.py"), "-m", BOTH, *SLOW_STEPS),
            *(f"hydra.sweep.dir={sweep_dir}", *arguments),
        ],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_rows(sweep_dir: Path, rows: int) -> None:
    """Wait until so many lines are in the metrics.csv of all runs together."""
    give_up = time.monotonic() + 90
    while sum(file.read_text().count("\n") for file in sweep_dir.glob("*/metrics.csv")) < rows:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def until_it_trains(process: subprocess.Popen[str], directory: Path, rows: int = 5) -> None:
    """Wait until so many steps are in metrics.csv."""
    give_up = time.monotonic() + 120
    metrics = directory / METRICS
    while not (metrics.exists() and metrics.read_text().count("\n") > rows):
        assert time.monotonic() < give_up
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process has started, in this order."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, found.stdout.split()))
