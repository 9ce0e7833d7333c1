"""What trainer.reduction=bitwise costs: a step of it against one that sums as usual.

The digits have 8×8 pixels; they are resized for the largest case.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paired import CONTROL, Ratio, ratio
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.rank_runs import train
from equiloss.records.results import Result

STEPS, BATCH = 40, 128
ORDER = ("sum", "bitwise", CONTROL)


class Case(NamedTuple):
    """A network, what it looks at, and how its batches are cut."""

    widths: list[int]
    """Channels of the network's stages."""
    image_size: int
    """Height and width, in pixels."""
    shards: int = 8


CASES = [Case([8, 16], 8), Case([32, 64], 8), Case([32, 64], 8, shards=2), Case([32, 64], 28)]


def step_times(directory: Path, rounds: int, case: Case) -> dict[str, list[float]]:
    """On every rank: seconds of a step in each round, by reduction."""
    times: dict[str, list[float]] = {name: [] for name in ORDER}
    for number in range(rounds + 1):
        # The ranks must agree on an order.
        for place in range(len(ORDER)):
            name = ORDER[(place + number) % len(ORDER)]
            options: dict[str, Any] = {
                "model": {"options": {"widths": case.widths}},
                "data": {"batch_size": BATCH, "image_size": case.image_size},
                "trainer": {
                    "precision": "32-true",
                    "reduction": "bitwise" if name == "bitwise" else "sum",
                    "shards": case.shards,
                    "max_steps": STEPS,
                },
            }
            result: Result = train(directory / f"{name}-{number}", options)
            if number:
                times[name].append(result.timing["train_s"] / STEPS)
    return times


def reduction(rounds: int) -> list[Ratio]:
    """Seconds of a step with the bitwise reduction, to one that sums: each case on 1 and 2 ranks.

    Args:
        rounds: How often each is timed, one thread for each rank.
    """
    measured = []
    for case in CASES:
        for ranks in (1, 2):
            with tempfile.TemporaryDirectory() as directory:
                times = run_ranks(step_times, ranks, Path(directory), rounds, case)[0]
            work = (
                f"{case.image_size}×{case.image_size}, widths {'-'.join(map(str, case.widths))}, "
                f"{case.shards} shards, {ranks} rank{'s' * (ranks > 1)}"
            )
            own, control = (times[name] for name in ORDER[1:])
            measured.append(ratio(work, None, own, times["sum"]))
            if len(measured) == 1:
                first = ratio(f"{work}: sum again", None, control, times["sum"])
    return [*measured, first]
