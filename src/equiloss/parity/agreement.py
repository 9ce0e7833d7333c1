"""How far one formulation is from the oracle, row by row, over the rows of all ranks."""

from __future__ import annotations

import math
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
    """This rank's rows with the oracle's values for them."""

    logits: Tensor
    """[n, K], float32 or float64."""
    target: Tensor
    """[n] int64 or [n, K] probabilities."""
    exact: Oracle


def compare(criterion: Criterion, batch: Rows, probe: Rows) -> Agreement:
    """Hold one formulation against the oracle on the rows of all ranks.

    Args:
        criterion: The formulation with the run's options.
        batch: The logits that the network gave.
        probe: Unit-normal logits with the same targets.

    Every rank must call it and gets the same result.
    """
    rows = _row_errors(criterion, batch)
    unit = _row_errors(criterion, probe)
    logits, exact = batch.logits, batch.exact
    sums = collectives.sum_over_ranks(
        torch.stack(
            [
                torch.where(rows.judged, rows.difference, 0).sum(),
                exact.mass,
                rows.nonfinite.sum().double(),
                rows.outside.sum().double(),
                (~logits.isfinite()).any(-1).sum().double(),
            ]
        )
    ).tolist()
    peaks = collectives.max_over_ranks(
        torch.stack(
            [
                peak(torch.where(rows.judged, rows.gradient_error, 0)),
                peak(torch.where(rows.outside, 0, rows.ratio)),
                peak(torch.where(unit.outside, 0, unit.ratio)),
            ]
        )
    ).tolist()
    difference, mass, nonfinite, outside, broken_logits = sums
    ratio = max(peaks[1:])
    return Agreement(
        loss_error=abs(difference) / mass if mass > 0 else abs(difference),
        grad_error=peaks[0],
        ratio=ratio,
        nonfinite=int(nonfinite),
        out_of_domain=int(outside),
        agree=ratio <= 1 and not broken_logits,
    )


@dataclass
class _RowErrors:
    difference: Tensor  # loss - oracle's loss [n]
    gradient_error: Tensor  # largest component [n]
    ratio: Tensor  # error over bound [n], inf where it should be finite and is not
    nonfinite: Tensor  # [n] bool
    outside: Tensor  # beyond the domain [n] bool
    judged: Tensor  # inside the domain and finite [n] bool


def _row_errors(criterion: Criterion, rows: Rows) -> _RowErrors:
    logits, target, exact = rows
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        losses = criterion.per_sample(x, target)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    outside = exact.spread > criterion.signature.domain(logits.dtype)
    nonfinite = ~(losses.isfinite() & gradient.isfinite().all(-1))
    difference = losses.detach().double() - exact.losses
    gradient_error = (gradient.double() - exact.gradient).abs().amax(-1)
    error = torch.maximum(difference.abs(), gradient_error)
    # An ignored row has bound 0 and must be exactly 0.
    ratio = torch.where(error == 0, 0, error / exact.bound)
    ratio = torch.where(nonfinite, math.inf, ratio)
    return _RowErrors(difference, gradient_error, ratio, nonfinite, outside, ~(outside | nonfinite))


def peak(values: Tensor) -> Tensor:
    """Largest value of [n], 0 for n = 0; NaN counts as infinite."""
    values = torch.nan_to_num(values, nan=math.inf, posinf=math.inf)
    return torch.cat([values, values.new_zeros(1)]).max()
