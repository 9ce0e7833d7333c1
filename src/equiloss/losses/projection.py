"""What a network gives for a batch: logits, or the head's input and the head, which make them.

With very many classes the logits [N, C] are what fills the memory. A loss whose first parameter is
`features` gets what they would be made from, and need never hold them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.signature import HEAD_BIAS, HEAD_WEIGHT


@dataclass(frozen=True)
class Outputs(ABC):
    """Outputs of a network, as a criterion takes them."""

    rows: Tensor
    """What belongs to each row: its logits [N, C], or its features [N, D]."""

    name: ClassVar[str]
    """What a loss calls the rows."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Unnormalised scores [N, C]."""

    @property
    def classes(self) -> int:
        """Number of classes C, or 0 for rows that have no shape of rows."""
        return self.rows.shape[-1] if self.rows.dim() else 0

    def head(self) -> dict[str, Tensor]:
        """What makes logits of the rows, by the names that a loss has for it."""
        return {}

    def with_rows(self, rows: Tensor) -> Self:
        """The same with other rows, of any number and dtype."""
        return replace(self, rows=rows)

    def detached(self) -> Self:
        """The same without the rows' graph."""
        return self.with_rows(self.rows.detach())

    def snapshot(self) -> Self:
        """The same values without a graph, which a later step of the optimizer does not change."""
        return self.detached()


class Logits(Outputs):
    """Logits themselves."""

    name = "logits"

    def logits(self) -> Tensor:
        """The rows [N, C]."""
        return self.rows


@dataclass(frozen=True)
class Projection(Outputs):
    """logits = features · weightᵀ + bias, where the rows are the features.

    >>> Projection(torch.tensor([[1.0, 2.0]]), torch.eye(2), None).logits().tolist()
    [[1.0, 2.0]]
    """

    weight: Tensor
    """The head's weight [C, D]."""
    bias: Tensor | None
    """The head's bias [C]."""

    name = "features"

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.weight.shape[0]

    def logits(self) -> Tensor:
        """Unnormalised scores [N, C]."""
        return F.linear(self.rows, self.weight, self.bias)

    def head(self) -> dict[str, Tensor]:
        """The head's weight, and its bias if it has one."""
        bias = {} if self.bias is None else {HEAD_BIAS: self.bias}
        return {HEAD_WEIGHT: self.weight, **bias}

    def snapshot(self) -> Projection:
        """With a copy of the head, which costs as much memory as the head does."""
        head = {name: part.detach().clone() for name, part in self.head().items()}
        return Projection(self.rows.detach(), head[HEAD_WEIGHT], head.get(HEAD_BIAS))


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of several parts of a batch as one: rows [n_1, …], [n_2, …] -> [n, …].

    >>> joined([Logits(torch.zeros(2, 3)), Logits(torch.zeros(1, 3))]).rows.shape
    torch.Size([3, 3])
    """
    return parts[0].with_rows(torch.cat([part.rows for part in parts]))
