"""A hundred steps on any number of devices, in any number of micro-batches, against one device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.controls import local_means
from equiloss.invariance.rank_runs import train
from equiloss.records.results import read_metrics

STEPS = 100
BATCH = 47
WORLD_SIZES = (1, 2, 3, 4)
MICRO_BATCHES = (1, 4)
CURVES = {"loss": "train/loss", "gradient norm": "train/grad_norm"}
# Float64 rounds at 1e-16, and a hundred steps of training amplify it a hundredfold.
BOUND = 1e-11
CONTROL = "control"


def measure(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Train in every split of the work, and hold every step against one device's."""
    part = Part(
        f"{STEPS} steps of training",
        f"The digits with augmentation, float64, batches of {BATCH} rows and a short last one; "
        "class weights and label smoothing. Largest relative difference, over all steps in "
        f"metrics.csv, to one process with one micro-batch; at most {BOUND:g}. Of the final "
        "weights, the difference's norm relative to theirs.",
    )
    for world_size in world_sizes:
        run_ranks(_trajectories, world_size, directory)
    one = directory / _name(1, 1)
    for world_size in world_sizes:
        for micro_batches in MICRO_BATCHES:
            if (world_size, micro_batches) == (1, 1):
                continue
            name = _name(world_size, micro_batches)
            for row, key in CURVES.items():
                apart = differences(directory / name, one, key)
                part.series[f"{row}, {name}"] = apart
                part.cells.append(Cell(row, name, max(apart), BOUND))
            apart = [weights_apart(directory / name, one)]
            part.cells.append(Cell("weights", name, max(apart), BOUND))
    if (directory / CONTROL).exists():
        for row, key in CURVES.items():
            part.series[f"{row}, {CONTROL}"] = differences(directory / CONTROL, one, key)
        # The proof can fail: the usual reduction is another number from the first steps on.
        assert max(part.series[f"loss, {CONTROL}"]) > 1e-3
    return {"trajectories": part}


def differences(run_dir: Path, reference: Path, key: str) -> list[float]:
    """Relative difference of one metric at each step of two runs."""
    found, expected = (read_metrics(place, key) for place in (run_dir, reference))
    assert len(found) == len(expected) == STEPS
    return [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]


def weights_apart(run_dir: Path, reference: Path) -> float:
    """Norm of the difference of the last weights of two runs, relative to the weights."""
    found, expected = (_weights(place) for place in (run_dir, reference))
    return float((found - expected).norm() / expected.norm())


def _weights(run_dir: Path) -> Tensor:
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def _name(world_size: int, micro_batches: int) -> str:
    return f"W={world_size}, m={micro_batches}"


def _trajectories(directory: Path) -> None:
    """On every rank: the runs of one world size."""
    world_size = collectives.world_size()
    options = {"trainer": {"max_steps": STEPS}, "data": {"batch_size": BATCH}}
    longest = -(-BATCH // world_size)
    for micro_batches in MICRO_BATCHES:
        size = -(-longest // micro_batches)
        train(
            directory / _name(world_size, micro_batches),
            options,
            {"trainer": {"micro_batch_size": size}},
        )
    if world_size == 2:
        with local_means():
            train(directory / CONTROL, options)
