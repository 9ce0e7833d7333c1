"""How far one formulation is from the oracle, row by row, over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equiloss.distributed import collectives
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Outputs
from equiloss.parity.oracle import Oracle

# Logits of a check, up to which all formulations are evaluated at once.
TOGETHER = 2**20


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


def same_function(one: Criterion, other: Criterion) -> bool:
    """Whether two losses are one function object with equal options, and hold no state."""
    defaults = {key: option.default for key, option in one.signature.options.items()}
    return (
        one.loss is other.loss
        and not isinstance(one.loss, nn.Module)
        and "class_counts" not in one.signature.supported
        and defaults | one.options == defaults | other.options
    )


def compare(criterions: Sequence[Criterion], rows: Rows) -> list[Agreement]:
    """Hold formulations with the run's options against the oracle on the rows of all ranks.

    Every rank must call it and gets the same result.
    """
    n, count, exact = rows.batch, len(criterions), rows.exact
    # One backward pass for all, unless their graphs would fill the memory.
    together = count if rows.logits.numel() <= TOGETHER else 1
    parts = [criterions[first : first + together] for first in range(0, count, together)]
    pairs = [_row_errors(part, rows) for part in parts]
    broken = (~rows.logits.isfinite()).any(-1)
    about_rows = torch.stack([exact.bound, exact.spread, exact.masses, broken.double()])
    # In one piece to the host, where an operation on some hundred numbers takes a tenth as long.
    errors = [part for kind in zip(*pairs, strict=True) for part in kind]
    values = torch.cat([*errors, about_rows]).cpu().numpy()
    difference, gradient_error = values[:count], values[count : 2 * count]  # [F, 2n]
    bound, spread, masses, is_broken = values[2 * count :]  # [2n]
    domains = [each.signature.domain(rows.logits.dtype) for each in criterions]
    outside = spread > np.array(domains)[:, None]
    error = np.maximum(abs(difference), gradient_error)
    nonfinite = ~np.isfinite(error)
    with np.errstate(divide="ignore", invalid="ignore"):
        # An ignored row has bound 0 and must be exactly 0.
        ratio = np.where(error == 0, 0, error / bound)
    judged = ~(outside | nonfinite)
    sums = [
        np.where(judged, difference, 0)[:, :n].sum(-1),
        nonfinite[:, :n].sum(-1),
        outside[:, :n].sum(-1),
        [masses[:n].sum(), is_broken[:n].sum()],
    ]
    peaks = [
        _peaks(np.where(judged, gradient_error, 0)[:, :n]),
        _peaks(np.where(outside, 0, ratio)),
    ]
    summed = collectives.sum_over_ranks(exact.bound.new_tensor(np.concatenate(sums))).tolist()
    largest = collectives.max_over_ranks(exact.bound.new_tensor(np.concatenate(peaks))).tolist()
    mass, broken_logits = summed[3 * count :]
    return [
        Agreement(
            loss_error=abs(summed[at]) / mass if mass > 0 else abs(summed[at]),
            grad_error=largest[at],
            ratio=largest[count + at],
            nonfinite=int(summed[count + at]),
            out_of_domain=int(summed[2 * count + at]),
            agree=largest[count + at] <= 1 and not broken_logits,
        )
        for at in range(count)
    ]


def _peaks(values: Any) -> Any:
    """Largest value of each row of [F, n], 0 for n = 0; NaN counts as infinite."""
    return np.where(np.isnan(values), np.inf, values).max(-1, initial=0)


def _row_errors(criterions: Sequence[Criterion], rows: Rows) -> tuple[Tensor, Tensor]:
    """Errors of each row's loss and of its gradient [F, 2n], not finite where one is broken."""
    exact = rows.exact
    with torch.enable_grad():
        leaves = [rows.logits.detach().requires_grad_() for _ in criterions]
        pairs = zip(criterions, leaves, strict=True)
        losses = [criterion.per_sample(leaf, rows.target) for criterion, leaf in pairs]
        ones = [torch.ones_like(each) for each in losses]
        gradients = torch.autograd.grad(losses, leaves, ones)
    errors = torch.stack(gradients).double().sub_(exact.gradient).abs_().amax(-1)
    return torch.stack(losses).detach().double() - exact.losses, errors
