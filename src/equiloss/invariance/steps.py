"""The steps of the gradients' matrix: options, global batch, and how it is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equiloss.data.sampler import rank_rows
from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.models.networks import ConvNet

CLASSES = 5
# Slices of 1 to 4 ranks have 5 equal or nearly equal micro-batches, and none is a multiple of 4.
ROWS = 59
WORLD_SIZES = (1, 2, 3, 4)
MICRO_BATCHES = (1, 2, 5)
LOSSES = ("softmax_nll", "log_softmax_nll", "cross_entropy")
WEIGHT = [0.3, 2.5, 1.0, 0.7, 4.0]


class Case(NamedTuple):
    """Options of the loss, and a global batch for them."""

    options: dict[str, Any]
    target: Tensor
    """Of the global batch: [N] classes, or [N, K] probabilities."""


def cases(world_size: int) -> dict[str, Case]:
    """What a batch may hold, by name.

    >>> list(cases(2))[:3]
    ['weights', 'label smoothing', 'ignored rows']
    """
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    ignored = target.masked_fill(torch.rand(ROWS, generator=generator) < 0.4, -100)
    soft = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)
    one_rank = target.clone()
    one_rank[rank_rows(ROWS, world_size - 1, world_size)] = -100
    everything = {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": -100}
    found = {
        "weights": Case({"weight": WEIGHT}, target),
        "label smoothing": Case({"label_smoothing": 0.1}, target),
        "ignored rows": Case({"ignore_index": -100}, ignored),
        "weights, smoothing, ignored": Case(everything, ignored),
        "soft targets": Case({}, soft),
        "everything ignored": Case(everything, torch.full_like(target, -100)),
    }
    if world_size > 1:
        found["a rank with all ignored"] = Case(everything, one_rank)
        found["a rank without rows"] = Case(everything, target[: world_size - 1])
    return found


@dataclass(frozen=True)
class Step:
    """A cell to be: one optimizer step."""

    case: str
    loss: str
    micro_batches: int


def steps(world_size: int) -> list[Step]:
    """Every step of a world size."""
    return [
        Step(case, loss, micro_batches)
        for case in cases(world_size)
        for loss in LOSSES
        for micro_batches in MICRO_BATCHES
    ]


def network(dtype: torch.dtype) -> nn.Module:
    """The same small network on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(CLASSES, 1, widths=(8,)).to(dtype)


def own_rows(rows: int, rank: int) -> slice:
    """The rows of a global batch that belong to a rank."""
    return rank_rows(rows, rank, collectives.world_size())


def micro_batch_size(rows: int, step: Step) -> int:
    """Rows per forward pass that cut the longest slice into `step.micro_batches`."""
    longest = -(-rows // collectives.world_size())
    return -(-longest // step.micro_batches)


def global_batch(step: Step, dtype: torch.dtype) -> Batch:
    """The global batch of a step."""
    target = cases(collectives.world_size())[step.case].target
    if target.is_floating_point():
        target = target.to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(images[: len(target)], target, torch.arange(len(target)), 0)
