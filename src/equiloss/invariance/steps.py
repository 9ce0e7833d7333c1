"""The steps of the gradients' matrix: options of the loss, global batch, and its division."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equiloss.data.sampler import part_of
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
    """Kinds of batch, by name: options of the loss with targets for them.

    >>> list(cases(2))[:3]
    ['weights', 'label smoothing', 'ignored rows']
    """
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    ignored = target.masked_fill(torch.rand(ROWS, generator=generator) < 0.4, -100)
    soft = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)
    all_options = {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": -100}
    any_size = {
        "weights": Case({"weight": WEIGHT}, target),
        "label smoothing": Case({"label_smoothing": 0.1}, target),
        "ignored rows": Case({"ignore_index": -100}, ignored),
        "weights, smoothing, ignored": Case(all_options, ignored),
        "soft targets": Case({}, soft),
        "everything ignored": Case(all_options, torch.full_like(target, -100)),
    }
    if world_size == 1:
        return any_size
    last_ignored = target.clone()
    last_ignored[part_of(ROWS, world_size - 1, world_size)] = -100
    return any_size | {
        "a rank with all ignored": Case(all_options, last_ignored),
        "a rank without rows": Case(all_options, target[: world_size - 1]),
    }


class Step(NamedTuple):
    """One optimizer step of the matrix."""

    case: str
    """Name of the kind of batch."""
    loss: str
    """Name of the formulation."""
    micro_batches: int
    """Micro-batches of the longest slice."""


def steps(world_size: int) -> list[Step]:
    """All steps of a world size: each kind of batch, formulation and number of micro-batches."""
    return [Step(*choice) for choice in product(cases(world_size), LOSSES, MICRO_BATCHES)]


def network(dtype: torch.dtype) -> nn.Module:
    """The same small network on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(CLASSES, 1, widths=(8,)).to(dtype)


def micro_batch_size(rows: int, micro_batches: int) -> int:
    """Rows per forward pass that cut a global batch's longest slice into so many micro-batches."""
    longest = -(-rows // collectives.world_size())
    return -(-longest // micro_batches)


def global_batch(step: Step, dtype: torch.dtype) -> Batch:
    """The global batch of a step: images [N, 1, 8, 8] from a fixed seed, and its case's targets."""
    target = cases(collectives.world_size())[step.case].target
    if target.is_floating_point():
        target = target.to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    rows = len(target)
    return Batch(images[:rows], target, torch.arange(rows), epoch=0, rows=rows)
