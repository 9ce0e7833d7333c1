"""Inputs and results of a loss, the bound of their rounding errors, and both as Python code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Two evaluations of one function may differ by this many roundings of `rounding`. The built-in
# losses need at most 8 of them; the errors that laws look for are thousands of times larger.
ROUNDINGS = 32


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call of a loss."""

    logits: Tensor
    """[N, C]; their dtype is that of the evaluation."""
    target: Tensor
    """Classes [N] int64, or probabilities [N, C]."""
    weight: tuple[float, ...] | None = None
    """Weight of each class."""
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    """None is the loss's default."""

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return self.logits.shape[0]

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.logits.shape[1]

    @property
    def soft(self) -> bool:
        """Whether the targets are probabilities."""
        return self.target.is_floating_point()

    def select(self, rows: list[int]) -> Case:
        """The case with these rows alone, in this order."""
        return replace(self, logits=self.logits[rows], target=self.target[rows])

    def to(self, dtype: torch.dtype) -> Case:
        """The case with its logits and probabilities in another dtype."""
        target = self.target.to(dtype) if self.soft else self.target
        return replace(self, logits=self.logits.to(dtype), target=target)

    def options(self) -> dict[str, Any]:
        """Options of a criterion that differ from those of a plain call."""
        options = {
            "weight": None if self.weight is None else list(self.weight),
            "label_smoothing": self.label_smoothing or None,
            "ignore_index": self.ignore_index,
        }
        return {key: value for key, value in options.items() if value is not None}


class Evaluation(NamedTuple):
    """Result of one call of a loss."""

    losses: Tensor
    """[N]."""
    gradient: Tensor
    """Of the sum of the losses with respect to the logits [N, C]."""

    def select(self, rows: list[int]) -> Evaluation:
        """The result for these rows alone, in this order."""
        return Evaluation(self.losses[rows], self.gradient[rows])

    def errors(self, exact: Evaluation) -> Tensor:
        """Largest error of each row [N], over its loss and the components of its gradient."""
        gradient_errors = (self.gradient - exact.gradient).abs().amax(-1)
        return torch.maximum((self.losses - exact.losses).abs(), gradient_errors)


def batch(
    rows: int,
    classes: int,
    *,
    scale: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Make a case of normal logits, and of targets that take the classes in turn.

    Args:
        rows: N.
        classes: C.
        scale: Standard deviation of the logits.
        seed: Another seed gives other logits.
        dtype: Of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    # + 0 leaves no -0, which a scale of 0 makes.
    return Case(logits.to(dtype) + 0, torch.arange(rows) % classes)


def one_hot(case: Case) -> Case:
    """The case with its classes as one-hot probabilities [N, C]."""
    return replace(case, target=F.one_hot(case.target, case.classes).to(case.logits.dtype))


def soft(case: Case, seed: int = 0) -> Case:
    """The case with random probabilities [N, C], all above 0, as its targets."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    return replace(case, target=scores.softmax(-1).to(case.logits.dtype))


def class_weights(classes: int) -> tuple[float, ...]:
    """Unequal class weights, one of them 0: 0.5, 2, 0, 3, and so on."""
    return tuple((0.5, 2.0, 0.0, 3.0)[label % 4] for label in range(classes))


def rounding(case: Case, losses: Tensor, gradient: Tensor) -> Tensor:
    """Bound on the rounding error between two evaluations of each row [N], in loss or gradient.

        ROUNDINGS · eps · (1 + |loss| + (1 + |g|) (1 + |x|))    |g| = sum_c |g_c|, |x| = max_c |x_c|

    Each logit and each sum of logits on the way is rounded in proportion to |x|, and reaches the
    result times the slope |g|; the result is rounded in proportion to itself; probabilities and
    their logarithms are rounded in units of 1. The first and third are the terms of Blanchard,
    Higham & Higham, "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer.
    Anal. 41(4), 2021; a loss made of softmax inherits them.

    Args:
        case: Its logits' dtype is that of the evaluations.
        losses: Result of one evaluation [N].
        gradient: Of the sum of losses with respect to the logits [N, C].
    """
    eps = torch.finfo(case.logits.dtype).eps
    slope = gradient.double().abs().sum(-1)
    size = case.logits.double().abs().amax(-1)
    return ROUNDINGS * eps * (1 + losses.double().abs() + (1 + slope) * (1 + size))


def literal(value: float, dtype: torch.dtype) -> str:
    """The shortest text that Python reads back as this number of `dtype`.

    >>> literal(0.1, torch.float64), literal(torch.tensor(0.1).item(), torch.float32)
    ('0.1', '0.1')
    >>> literal(float("nan"), torch.float32), literal(-1e4, torch.float32)
    ('torch.nan', '-10000.0')
    """
    if not math.isfinite(value):
        return "torch.nan" if math.isnan(value) else "torch.inf" if value > 0 else "-torch.inf"
    for digits in range(1, 17):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=dtype).item() == value:
            return repr(short)
    return repr(value)


def tensor_code(tensor: Tensor) -> str:
    """Write a tensor as the Python expression that makes it again.

    >>> tensor_code(torch.tensor([[0.1, 2.0]], dtype=torch.float64))
    'torch.tensor([[0.1, 2.0]], dtype=torch.float64)'
    >>> tensor_code(torch.zeros(2, 1000)), tensor_code(torch.zeros(0, 2))
    ('torch.full((2, 1000), 0.0)', 'torch.zeros(0, 2)')
    """
    dtype = "" if tensor.dtype in (torch.float32, torch.int64) else f", dtype={tensor.dtype}"
    if tensor.numel() == 0:
        kind = ", dtype=torch.int64" if tensor.dtype == torch.int64 else dtype
        return f"torch.zeros({', '.join(map(str, tensor.shape))}{kind})"
    first = tensor.flatten()[0]
    if tensor.numel() > 8 and bool((tensor == first).all()):
        return f"torch.full({tuple(tensor.shape)}, {entries(first)}{dtype})"
    return f"torch.tensor({entries(tensor)}{dtype})"


def entries(tensor: Tensor) -> str:
    """Write the entries of a tensor as nested lists.

    >>> entries(torch.tensor([[0.1, 2.0]]))
    '[[0.1, 2.0]]'
    """
    if tensor.ndim:
        return f"[{', '.join(entries(part) for part in tensor)}]"
    value = tensor.item()
    return literal(value, tensor.dtype) if tensor.is_floating_point() else str(value)
