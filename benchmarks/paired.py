"""Arrangements of one piece of work, timed in turn, and their ratios.

Machines are noisy and drift; what was measured next to each other can be compared. So each
arrangement is a process of its own, that waits until it is asked; a round asks each of them once,
in an order of its own; and a ratio is the median over rounds of quotients within a round. The
first arrangement is the baseline. It takes part twice: its ratio to itself says how far the others
can be trusted.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Two pools of threads on the same cores ruin a figure, and so does memory that one process maps
# anew in each step while another happens to keep it.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**30)),
}
ROOT = Path(__file__).parents[1]
CONTROL = "the baseline again"

Measure = Callable[[], float]


@dataclass
class Arrangement:
    """One way to do the work: `module:function(**options)` gives what measures it once.

    What it gives is called once per round and returns seconds per unit of work.
    """

    name: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    wanted: float | None = None
    """The ratio that was set as the aim, if one was."""


class Ratio(NamedTuple):
    """Seconds of an arrangement, and how they compare with the baseline's in the same round."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    wanted: float | None


class Worker:
    """A process that measures one arrangement whenever it is asked."""

    def __init__(self, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.paired"),
                *(arrangement.target, json.dumps(arrangement.options)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
        )

    def measure(self) -> float:
        """Seconds per unit of work."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("measure", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            _, said = self.process.communicate()
            raise RuntimeError(f"{self.arrangement.name}: {said.strip()[-2000:]}")
        return float(answer)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def ratios(
    arrangements: Sequence[Arrangement], *, rounds: int, seed: int = 0, warm_up: bool = True
) -> list[Ratio]:
    """Time arrangements in turn; ratios are to the first one.

    Args:
        arrangements: The baseline first.
        rounds: How often each is timed, twice at least.
        seed: Of the order within the rounds.
        warm_up: Whether a first time of each does not count.
    """
    baseline = arrangements[0]
    everything = [*arrangements, Arrangement(CONTROL, baseline.target, baseline.options)]
    workers = [Worker(each) for each in everything]
    seconds: list[list[float]] = [[] for _ in workers]
    shuffled = random.Random(seed)
    try:
        for number in range(rounds + warm_up):
            order = list(range(len(workers)))
            shuffled.shuffle(order)
            for place in order:
                time = workers[place].measure()
                if number or not warm_up:
                    seconds[place].append(time)
    finally:
        for worker in workers:
            worker.close()
    return [
        ratio(each.name, each.wanted, own, seconds[0])
        for each, own in zip(everything, seconds, strict=True)
    ]


def ratio(name: str, wanted: float | None, own: list[float], baseline: list[float]) -> Ratio:
    """Compare seconds of an arrangement with the baseline's, round by round."""
    quotients = [mine / theirs for mine, theirs in zip(own, baseline, strict=True)]
    # Inclusive: of two or three rounds the other method gives what no round had.
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return Ratio(name, statistics.median(own), median, low, high, wanted)


def serve(target: str, options: dict[str, Any]) -> None:
    """Measure once for each line that comes in."""
    # What the work itself prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = target.split(":")
    measure: Measure = getattr(importlib.import_module(module), name)(**options)
    for _ in sys.stdin:
        print(measure(), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
