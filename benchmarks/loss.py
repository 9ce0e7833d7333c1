"""The criterion against `torch.nn.functional.cross_entropy`, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paired import Arrangement, Measure
from equiloss.losses.criterion import Criterion, LossSum

SHAPES = {(128, 10): (2000, 1.8), (512, 1000): (60, 1.10), (1024, 21841): (3, 1.02)}
"""Rows and classes, with the repetitions of a measurement and the ratio that is the aim."""

CRITERION = Criterion("cross_entropy")


def mean_of_criterion(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of a batch on one device, by sum and mass."""
    loss: LossSum = CRITERION(logits, target)
    return loss.total / loss.mass


def unreduced(logits: Tensor, target: Tensor) -> Tensor:
    """The least that a sum and a mass can cost: torch's own losses, counted and divided."""
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.sum() / (target != -100).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.cross_entropy": F.cross_entropy,
    "F.cross_entropy by rows, summed, counted, divided": unreduced,
    "Criterion": mean_of_criterion,
}


def forward_and_backward(name: str, rows: int, classes: int) -> Measure:
    """Seconds for a loss and its gradient at logits [rows, classes]."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    loss, (repetitions, _) = LOSSES[name], SHAPES[rows, classes]

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(repetitions):
            logits.grad = None
            loss(logits, target).backward()  # type: ignore[no-untyped-call]
        return (time.perf_counter() - began) / repetitions

    return measure


def arrangements(rows: int, classes: int) -> list[Arrangement]:
    """Each loss at one shape, torch's own first."""
    own = "benchmarks.loss:forward_and_backward"
    options = {"rows": rows, "classes": classes}
    wanted = {"Criterion": SHAPES[rows, classes][1]}
    return [Arrangement(name, own, {"name": name, **options}, wanted.get(name)) for name in LOSSES]
