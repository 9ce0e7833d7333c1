"""Processes from their start: to the first step, through a sweep, and to a page of help."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks.paired import Arrangement, Measure

ROOT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)
EQUILOSS = shlex.quote(str(Path(sys.executable).parent / "equiloss"))
IMPORTS = f"{PYTHON} -c 'import torch, lightning'"
ONE_STEP = f"{PYTHON} train.py callbacks=quiet trainer.max_steps=1"
HELP = (f"{EQUILOSS} losses", f"{PYTHON} train.py --help", f"{PYTHON} train.py --cfg job")
WANTED_OF_SUITE = 360
LOSSES = ("softmax_nll", "log_softmax_nll", "cross_entropy")


def wall(commands: list[str]) -> Measure:
    """Seconds for some commands, one after the other; `{runs}` is a directory that is new."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            for command in commands:
                done = subprocess.run(
                    shlex.split(command.replace("{runs}", directory)),
                    cwd=ROOT,
                    env=os.environ,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"{command}: {done.stderr.decode()[-2000:]}")
            return time.perf_counter() - began

    return measure


class WriteTime(Callback):
    """Writes the time at which the first step had ended."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, *_: Any) -> None:
        """Write it once."""
        if not self.path.exists():
            self.path.write_text(repr(time.time()))


def first_step() -> Measure:
    """Seconds from the start of a process to the end of its first step."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as directory:
            began = time.time()
            command = f"{ONE_STEP} hydra.run.dir={directory}/run"
            watch = "callbacks.items.watch.target=benchmarks.commands:WriteTime"
            subprocess.run(
                [*shlex.split(command), f"+{watch}", f"+callbacks.items.watch.path={directory}/at"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return float(Path(directory, "at").read_text()) - began

    return measure


def suite() -> float:
    """Seconds of `make test` where everything is installed."""
    return wall(["make test ARGS="])()


def arrangements(part: str) -> list[Arrangement]:
    """Commands side by side, the baseline first."""

    def way(name: str, *commands: str, wanted: float | None = None) -> Arrangement:
        return Arrangement(name, "benchmarks.commands:wall", {"commands": [*commands]}, wanted)

    if part == "start":
        first = Arrangement(
            "train.py to its first step", "benchmarks.commands:first_step", wanted=1.15
        )
        return [way("import torch, lightning", IMPORTS), first]
    if part == "help":
        names = [
            command.replace(PYTHON, "python").replace(EQUILOSS, "equiloss") for command in HELP
        ]
        pages = [way(name, command) for name, command in zip(names, HELP, strict=True)]
        return [way("import torch", f"{PYTHON} -c 'import torch'"), *pages]
    run = f"{PYTHON} train.py callbacks=quiet"
    alone = [
        f"{run} loss={loss} seed={seed} hydra.run.dir={{runs}}/{loss}{seed}"
        for loss in LOSSES
        for seed in (0, 1)
    ]
    sweep = f"{PYTHON} train.py -m sweep=losses callbacks=quiet hydra.sweep.dir={{runs}}/sweep"
    return [
        way("six runs", *alone),
        way("sweep=losses", sweep, wanted=1 / 3),
        way("sweep=losses sweep.parallel=auto", f"{sweep} sweep.parallel=auto", wanted=1 / 3),
    ]
