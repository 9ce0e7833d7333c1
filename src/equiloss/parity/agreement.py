"""How far one formulation is from the oracle, row by row, over the rows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.distributed import collectives
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Outputs
from equiloss.parity.oracle import Oracle


@dataclass
class Agreement:
    """The largest deviations of one formulation so far."""

    loss_error: float = 0.0
    """|loss - oracle's loss| of a global batch, in nats."""
    grad_error: float = 0.0
    """Largest |component of d(sum of losses)/d(logits) - oracle's|: mass times the mean's."""
    ratio: float = 0.0
    """Largest error of a row over its bound, probe included; above 1 is a disagreement."""
    nonfinite: int = 0
    """Rows whose loss or gradient was not finite."""
    out_of_domain: int = 0
    """Rows whose logits spread too far for the formulation."""
    agree: bool = True

    def add(self, other: Agreement) -> None:
        """Take the other's values where they are worse, and add its counts."""
        self.loss_error = max(self.loss_error, other.loss_error)
        self.grad_error = max(self.grad_error, other.grad_error)
        self.ratio = max(self.ratio, other.ratio)
        self.nonfinite += other.nonfinite
        self.out_of_domain += other.out_of_domain
        self.agree = self.agree and other.agree


class Seen(NamedTuple):
    """What a step was given and made, before the optimizer changed a parameter."""

    outputs: Outputs
    """The network's outputs for this rank's rows."""
    target: Tensor
    """This rank's targets [n] or [n, K]."""
    criterion: Criterion
    """The loss that trains."""


class Rows(NamedTuple):
    """This rank's n rows and behind them a probe for each, with the oracle's values."""

    logits: Tensor
    """What the network gave [n, K], then unit-normal ones [n, K]; float32 or float64."""
    target: Tensor
    """[2n] int64 or [2n, K] probabilities; the probe has the batch's."""
    exact: Oracle

    @property
    def batch(self) -> int:
        """n, the rows of the batch itself."""
        return len(self.target) // 2


def compare(criterions: Sequence[Criterion], rows: Rows) -> list[Agreement]:
    """Hold formulations with the run's options against the oracle on the rows of all ranks.

    Every rank must call it and gets the same result.
    """
    n, exact = rows.batch, rows.exact
    difference, gradient_error = (
        torch.stack(errors)  # [F, 2n]
        for errors in zip(*(_row_errors(each, rows) for each in criterions), strict=True)
    )
    domains = [each.signature.domain(rows.logits.dtype) for each in criterions]
    outside = exact.spread > exact.spread.new_tensor(domains).unsqueeze(-1)
    error = torch.maximum(difference.abs(), gradient_error)
    nonfinite = ~error.isfinite()
    # An ignored row has bound 0 and must be exactly 0.
    ratio = torch.where(error == 0, 0, error / exact.bound)
    judged = ~(outside | nonfinite)[:, :n]
    sums = [
        torch.where(judged, difference[:, :n], 0).sum(-1),
        nonfinite[:, :n].sum(-1).double(),
        outside[:, :n].sum(-1).double(),
    ]
    peaks = [
        peak(torch.where(judged, gradient_error[:, :n], 0)),
        peak(ratio.masked_fill(outside, 0)),
    ]
    broken = (~rows.logits[:n].isfinite()).any(-1).sum().double()
    *summed, mass, broken_logits = collectives.sum_over_ranks(
        torch.cat([*sums, exact.first(n).mass.reshape(1), broken.reshape(1)])
    ).tolist()
    largest = collectives.max_over_ranks(torch.cat(peaks)).tolist()
    count = len(criterions)
    figures = [values[at::count] for values in (summed, largest) for at in range(count)]
    return [
        Agreement(
            loss_error=abs(total) / mass if mass > 0 else abs(total),
            grad_error=grad_error,
            ratio=largest_ratio,
            nonfinite=int(not_finite),
            out_of_domain=int(beyond),
            agree=largest_ratio <= 1 and not broken_logits,
        )
        for (total, not_finite, beyond), (grad_error, largest_ratio) in zip(
            figures[:count], figures[count:], strict=True
        )
    ]


def _row_errors(criterion: Criterion, rows: Rows) -> tuple[Tensor, Tensor]:
    """Loss - oracle's loss, and the gradient's largest error [2n]; not finite where one is not."""
    logits, target, exact = rows
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        losses = criterion.per_sample(x, target)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    error = gradient.double().sub_(exact.gradient).abs_().amax(-1)
    return losses.detach().double() - exact.losses, error


def peak(values: Tensor) -> Tensor:
    """Largest value along the last dimension, 0 where it has none; NaN counts as infinite."""
    values = torch.nan_to_num(values, nan=math.inf, posinf=math.inf)
    return torch.cat([values, values.new_zeros((*values.shape[:-1], 1))], dim=-1).amax(-1)
