"""An evaluation on any number of devices, ranks without a sample included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from equiloss.config import SPLIT_METRICS
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.rank_runs import train
from equiloss.training.classifier import Classifier

WORLD_SIZES = (1, 2, 3, 4)
# 359 is a prime; of 3 and of 1 samples not every rank gets one.
LENGTHS = (359, 3, 1)
# Sums of float64 in another order, over at most 359 rows.
BOUND = 1e-12
COUNTS = ("acc", "balanced_acc", "acc_top5")


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
    part.cells = [cell for length in LENGTHS for cell in compare(found, length)]
    return {"evaluation": part}


def compare(found: dict[int, dict[int, Figures]], length: int) -> list[Cell]:
    """Hold every world size's figures of one length against those of one process."""
    cells = []
    expected = found[1][length]
    for world_size, by_length in found.items():
        got, column = by_length[length], f"W={world_size}"

        def add(row: str, figure: float, bound: float = 0.0, column: str = column) -> None:
            cells.append(Cell(f"N={length}, {row}", column, figure, bound))

        for name in SPLIT_METRICS:
            a, b = got.metrics[f"test/{name}"], expected.metrics[f"test/{name}"]
            if name in COUNTS:
                add(name, int(a != b))
            else:
                add(name, abs(a - b) / abs(b), BOUND)
        pairs = zip(got.confusion, expected.confusion, strict=True)
        add("confusion matrix", sum(a != b for rows in pairs for a, b in zip(*rows, strict=True)))
        # Each sample was seen, and seen once.
        add("samples", abs(got.samples - length) + abs(sum(map(sum, got.confusion)) - length))
    return cells


@dataclass
class Figures:
    """What one evaluation found."""

    metrics: dict[str, Any]
    samples: int
    confusion: list[list[int]]


class _Keep(Callback):
    """Keeps the confusion matrix of a test."""

    def __init__(self) -> None:
        self.confusion: list[list[int]] = []

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        self.confusion = pl_module.evaluated["test"].confusion.tolist()


def _evaluations(directory: Path) -> dict[int, Figures]:
    """On every rank: every length on one world size."""
    trained = directory / "trained"
    if collectives.world_size() == 1:
        train(trained, {"trainer": {"max_steps": 30}})
    found = {}
    for length in LENGTHS:
        keep = _Keep()
        result = train(
            directory / f"W{collectives.world_size()}-N{length}",
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
        found[length] = Figures(result.metrics, result.samples["test"], keep.confusion)
    return found
