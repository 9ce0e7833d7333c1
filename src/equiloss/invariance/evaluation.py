"""An evaluation on any number of devices, ranks without a sample included."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from equiloss.config import SPLIT_METRICS
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.rank_runs import train
from equiloss.records.reading import read_json
from equiloss.records.results import Result
from equiloss.records.run_dir import EVALUATION, LAST_CHECKPOINT

WORLD_SIZES = (1, 2, 3, 4)
# 359 is a prime; of 3 and of 1 samples not every rank gets one.
LENGTHS = (359, 3, 1)
# Sums of float64 in another order, over at most 359 rows.
BOUND = 1e-12
ROUNDED = ("loss", "nll", "ece")
"""Metrics that are such sums; the others follow from counts."""


def measure(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Evaluate the same weights on each number of ranks."""
    part = Part(
        "Evaluation",
        f"One checkpoint on a test split of {', '.join(map(str, LENGTHS))} samples (N), in "
        "batches of 50, on 1 to 4 processes (W), float64. Counts and the confusion matrix: number "
        "of entries that differ from one process's; must be 0. Loss, nll and calibration error: "
        f"relative difference; at most {BOUND:g}.",
    )
    for world_size in world_sizes:
        run_ranks(_evaluate, world_size, directory)
    part.cells = [cell for length in LENGTHS for cell in compare(directory, length, world_sizes)]
    return {"evaluation": part}


def compare(directory: Path, length: int, world_sizes: tuple[int, ...]) -> list[Cell]:
    """Compare the evaluations of `length` samples on every world size with one process's."""
    cells = []
    expected, expected_counts, _ = _read(directory / _name(1, length))
    for world_size in world_sizes:
        metrics, counts, samples = _read(directory / _name(world_size, length))
        figures: dict[str, float] = {}
        for name in SPLIT_METRICS:
            value, reference = metrics[f"test/{name}"], expected[f"test/{name}"]
            if name in ROUNDED:
                figures[name] = abs(value - reference) / abs(reference)
            else:
                figures[name] = int(value != reference)
        pairs = zip(counts, expected_counts, strict=True)
        figures["confusion matrix"] = sum(a != b for a, b in pairs)
        # Each sample was seen, and seen once.
        figures["samples"] = abs(samples - length) + abs(sum(counts) - length)
        cells += [
            Cell(f"N={length}, {row}", f"W={world_size}", figure, BOUND if row in ROUNDED else 0.0)
            for row, figure in figures.items()
        ]
    return cells


def _read(run_dir: Path) -> tuple[dict[str, Any], list[int], int]:
    """Metrics, entries of the confusion matrix [K·K] and samples of a run's test split."""
    result = Result.read(run_dir)
    evaluation = read_json(run_dir / EVALUATION)
    return result.metrics, list(chain(*evaluation["test"]["confusion"])), result.samples["test"]


def _name(world_size: int, length: int) -> str:
    return f"W={world_size}, N={length}"


def _evaluate(directory: Path) -> None:
    """On every rank: test the weights of one short training on every number of samples."""
    world_size, trained = collectives.world_size(), directory / "trained"
    if world_size == 1:
        train(trained, {"trainer": {"max_steps": 30}})
    task = {"task": "test", "ckpt_path": str(trained / LAST_CHECKPOINT)}
    for length in LENGTHS:
        samples = None if length == max(LENGTHS) else length
        data = {"data": {"max_samples": samples, "eval_batch_size": 50}}
        train(directory / _name(world_size, length), task, data)
