"""What trainer.reduction=bitwise costs: `python benchmarks/bitwise.py`.

Step times of both reductions, in turn in the same processes, on 1 and 2 processes with one thread
each; the median of several runs, and their ratio. Machines are noisy, ratios less so.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from equiloss.invariance.here import train
from equiloss.results import Result
from equiloss.testing import run_ranks

MODELS = {"8-16": [8, 16], "32-64": [32, 64], "64-128": [64, 128]}
STEPS, BATCH, REPEATS = 40, 128, 5


def measure(directory: Path, widths: list[int]) -> dict[str, float]:
    """On every rank: the median time of a step with each reduction, in milliseconds."""
    found: dict[str, list[float]] = {"sum": [], "bitwise": []}
    for repeat in range(REPEATS):
        for reduction, times in found.items():
            options: dict[str, Any] = {
                "model": {"options": {"widths": widths}},
                "data": {"batch_size": BATCH},
                "trainer": {"precision": "32-true", "reduction": reduction, "max_steps": STEPS},
            }
            place = directory / f"{reduction}-{repeat}"
            result: Result = train(place, options)
            times.append(1000 * result.timing["train_s"] / STEPS)
    return {reduction: statistics.median(times) for reduction, times in found.items()}


def main() -> None:
    """Print the table of docs/bitwise.md."""
    print("| network (widths) | processes | sum (ms) | bitwise (ms) | ratio |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        for name, widths in MODELS.items():
            for ranks in (1, 2):
                directory = Path(place) / f"{name}-{ranks}"
                found = run_ranks(measure, ranks, directory, widths)[0]
                ratio = found["bitwise"] / found["sum"]
                print(
                    f"| {name} | {ranks} | {found['sum']:.1f} | {found['bitwise']:.1f} "
                    f"| {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
