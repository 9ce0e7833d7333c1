"""What trainer.reduction=bitwise costs: prints the table of docs/bitwise.md.

    python benchmarks/bitwise.py

Step times of both reductions, in turn in the same processes, on 1 and 2 processes with one thread
each; the median of several runs, and their ratio. Machines are noisy, ratios less so. The digits
have 8×8 pixels; they are resized for the larger cases.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.rank_runs import train
from equiloss.records.results import Result

STEPS, BATCH, REPEATS = 40, 128, 5


class Case(NamedTuple):
    """A network, what it looks at, and how its batches are cut."""

    widths: list[int]
    """Channels of the network's stages."""
    image_size: int
    """Height and width, in pixels."""
    shards: int = 8


CASES = [
    Case([8, 16], 8),
    Case([32, 64], 8),
    Case([32, 64], 8, shards=2),
    Case([32, 64], 28),
    Case([64, 128], 28),
]


def measure(directory: Path, case: Case) -> dict[str, float]:
    """On every rank: the median time of a step with each reduction, in milliseconds."""
    step_times: dict[str, list[float]] = {"sum": [], "bitwise": []}
    for repeat in range(REPEATS):
        for reduction, times in step_times.items():
            options: dict[str, Any] = {
                "model": {"options": {"widths": case.widths}},
                "data": {"batch_size": BATCH, "image_size": case.image_size},
                "trainer": {
                    "precision": "32-true",
                    "reduction": reduction,
                    "shards": case.shards,
                    "max_steps": STEPS,
                },
            }
            result: Result = train(directory / f"{reduction}-{repeat}", options)
            times.append(1000 * result.timing["train_s"] / STEPS)
    return {reduction: statistics.median(times) for reduction, times in step_times.items()}


def main() -> None:
    """Print the table of docs/bitwise.md."""
    print("| images | widths | shards | processes | sum (ms) | bitwise (ms) | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(CASES):
            for ranks in (1, 2):
                runs = Path(directory) / f"{number}-{ranks}"
                medians = run_ranks(measure, ranks, runs, case)[0]
                ratio = medians["bitwise"] / medians["sum"]
                widths = "-".join(map(str, case.widths))
                print(
                    f"| {case.image_size}×{case.image_size} | {widths} | {case.shards} | {ranks} "
                    f"| {medians['sum']:.1f} | {medians['bitwise']:.1f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
