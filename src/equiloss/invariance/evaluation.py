"""An evaluation on any number of devices, ranks without a sample included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from equiloss.classifier import Classifier
from equiloss.config import SPLIT_METRICS
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.here import train
from equiloss.losses import reduction
from equiloss.testing import run_ranks

WORLD_SIZES = (1, 2, 3, 4)
# 359 is a prime; of 3 and of 1 samples not every rank gets one.
LENGTHS = (359, 3, 1)
# Sums of float64 in another order, over at most 359 rows.
BOUND = 1e-12
COUNTS = ("acc", "acc_top5")


def measure(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Evaluate the same weights on each number of ranks."""
    part = Part(
        "Evaluation",
        f"One checkpoint on a test split of {', '.join(map(str, LENGTHS))} samples (N), in "
        "batches of 50, on 1 to 4 processes (W), float64. Counts and the confusion matrix: number "
        "of entries that differ from one process's; must be 0. Loss, nll and calibration error: "
        f"relative difference; at most {BOUND:g}.",
    )
    found = {size: run_ranks(_evaluations, size, directory)[0] for size in world_sizes}
    for length in LENGTHS:
        expected = found[1][length]
        for world_size in world_sizes:
            got = found[world_size][length]
            column = f"W={world_size}"
            for name in SPLIT_METRICS:
                a, b = got["metrics"][f"test/{name}"], expected["metrics"][f"test/{name}"]
                row = f"N={length}, {name}"
                if name in COUNTS:
                    part.cells.append(Cell(row, column, int(a != b), 0))
                else:
                    part.cells.append(Cell(row, column, abs(a - b) / abs(b), BOUND))
            wrong = sum(
                a != b
                for ours, theirs in zip(got["confusion"], expected["confusion"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
            part.cells.append(Cell(f"N={length}, confusion matrix", column, wrong, 0))
            lost = abs(got["samples"] - length) + abs(sum(map(sum, got["confusion"])) - length)
            part.cells.append(Cell(f"N={length}, samples", column, lost, 0))
    return {"evaluation": part}


class _Keep(Callback):
    """Keeps the confusion matrix of a test."""

    def __init__(self) -> None:
        self.confusion: list[list[int]] = []

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        self.confusion = pl_module.evaluated["test"].confusion.tolist()


def _evaluations(directory: Path) -> dict[int, dict[str, Any]]:
    """On every rank: every length on one world size."""
    trained = directory / "trained"
    if reduction.world_size() == 1:
        train(trained, {"trainer": {"max_steps": 30}})
    found = {}
    for length in LENGTHS:
        keep = _Keep()
        result = train(
            directory / f"W{reduction.world_size()}-N{length}",
            {
                "task": "test",
                "ckpt_path": str(trained / "checkpoints" / "last.ckpt"),
                "data": {
                    "max_samples": None if length == max(LENGTHS) else length,
                    "eval_batch_size": 50,
                },
            },
            callbacks=[keep],
        )
        found[length] = {
            "metrics": result.metrics,
            "samples": result.samples["test"],
            "confusion": keep.confusion,
        }
    return found
