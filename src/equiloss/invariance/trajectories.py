"""A hundred steps on any number of devices, in any number of micro-batches, against one device."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.controls import local_means
from equiloss.invariance.rank_runs import last_checkpoint, train
from equiloss.invariance.steps import WORLD_SIZES, micro_batch_size
from equiloss.records.results import read_metrics

STEPS = 100
BATCH = 47
MICRO_BATCHES = (1, 4)
CURVES = {"loss": "train/loss", "gradient norm": "train/grad_norm"}
# Float64 rounds at 1e-16, and a hundred steps of training amplify it a hundredfold.
BOUND = 1e-11
CONTROL = "control"


def measure(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Train in every split of the work, and compare every step with one device's."""
    part = Part(
        f"{STEPS} steps of training",
        f"The digits with augmentation, float64, batches of {BATCH} rows and a short last one; "
        "class weights and label smoothing. Largest relative difference, over all steps in "
        f"metrics.csv, to one process with one micro-batch; at most {BOUND:g}. Of the final "
        "weights, the difference's norm relative to theirs.",
    )
    for world_size in world_sizes:
        run_ranks(_train, world_size, directory)
    reference = directory / _name(1, 1)
    splits = product(world_sizes, MICRO_BATCHES)
    for name in [_name(*split) for split in splits if split != (1, 1)]:
        for row, key in CURVES.items():
            curve = curve_differences(directory / name, reference, key)
            part.series[f"{row}, {name}"] = curve
            part.cells.append(Cell(row, name, max(curve), BOUND))
        difference = weight_difference(directory / name, reference)
        part.cells.append(Cell("weights", name, difference, BOUND))
    control = directory / CONTROL
    if control.exists():
        for row, key in CURVES.items():
            part.series[f"{row}, {CONTROL}"] = curve_differences(control, reference, key)
        # The proof can fail: the usual reduction is another number from the first steps on.
        assert max(part.series[f"loss, {CONTROL}"]) > 1e-3
    return {"trajectories": part}


def curve_differences(run_dir: Path, reference: Path, key: str) -> list[float]:
    """Relative difference of one metric of a run to a reference run's, at each step."""
    values, expected = read_metrics(run_dir, key), read_metrics(reference, key)
    assert len(values) == len(expected) == STEPS
    return [abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True)]


def weight_difference(run_dir: Path, reference: Path) -> float:
    """Norm of the difference of two runs' last weights, relative to the reference's norm."""
    weights, expected = _weights(run_dir), _weights(reference)
    return float((weights - expected).norm() / expected.norm())


def _weights(run_dir: Path) -> Tensor:
    state = last_checkpoint(run_dir)["state_dict"]
    return torch.cat([state[name].flatten() for name in sorted(state)])


def _name(world_size: int, micro_batches: int) -> str:
    return f"W={world_size}, m={micro_batches}"


def _train(directory: Path) -> None:
    """On every rank: the runs of one world size."""
    world_size = collectives.world_size()
    options = {"trainer": {"max_steps": STEPS}, "data": {"batch_size": BATCH}}
    for micro_batches in MICRO_BATCHES:
        cut = {"trainer": {"micro_batch_size": micro_batch_size(BATCH, micro_batches)}}
        train(directory / _name(world_size, micro_batches), options, cut)
    if world_size == 2:
        with local_means():
            train(directory / CONTROL, options)
