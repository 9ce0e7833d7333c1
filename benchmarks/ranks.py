"""The exact reduction on two ranks against the usual one, a mean of local means."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from benchmarks.paired import CONTROL, Ratio, ratio
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.controls import local_means
from equiloss.invariance.rank_runs import train
from equiloss.records.results import Result

STEPS = 150
ORDER = ("mean of local means", "sum over ranks", CONTROL)


def step_times(directory: Path, rounds: int, weight: list[float] | None) -> dict[str, list[float]]:
    """On every rank: seconds of a step in each round, by reduction."""
    times: dict[str, list[float]] = {name: [] for name in ORDER}
    for number in range(rounds + 1):
        # The ranks must agree on an order.
        for place in range(len(ORDER)):
            name = ORDER[(place + number) % len(ORDER)]
            usual = contextlib.nullcontext() if name == ORDER[1] else local_means()
            with usual:
                options = {
                    "loss": {"name": "cross_entropy", "weight": weight},
                    "model": {"name": "mlp", "options": {"widths": [128, 128], "dropout": 0.0}},
                    "data": {"batch_size": 256},
                    "trainer": {"precision": "32-true", "max_epochs": None, "max_steps": STEPS},
                }
                result: Result = train(directory / f"{name}-{number}", options)
            if number:
                times[name].append(result.timing["train_s"] / STEPS)
    return times


def reduction(rounds: int, weight: list[float] | None = None) -> list[Ratio]:
    """Seconds of a step on two ranks, one thread each, by reduction.

    Args:
        rounds: How often.
        weight: Of each class; with them rows differ in what they count, and ranks must ask.
    """
    with tempfile.TemporaryDirectory() as directory:
        times = run_ranks(step_times, 2, Path(directory), rounds, weight)[0]
    wanted = {ORDER[1]: 1.02}
    return [ratio(name, wanted.get(name), times[name], times[ORDER[0]]) for name in ORDER]
