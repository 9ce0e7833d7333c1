"""Logits that are not there yet: the input of a network's head, and the head.

With very many classes the logits [N, C] are what fills the memory. A loss whose first parameter is
`features` gets what they would be made from, and need never hold them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Projection(NamedTuple):
    """logits = features · weightᵀ + bias.

    >>> import torch
    >>> Projection(torch.tensor([[1.0, 2.0]]), torch.eye(2), None).logits().tolist()
    [[1.0, 2.0]]
    """

    features: Tensor
    """The head's input [N, D]."""
    weight: Tensor
    """The head's weight [C, D]."""
    bias: Tensor | None
    """The head's bias [C]."""

    def logits(self) -> Tensor:
        """Unnormalised scores [N, C]."""
        return F.linear(self.features, self.weight, self.bias)

    def snapshot(self) -> Projection:
        """The same values without a graph, which a later step of the optimizer does not change."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Projection(self.features.detach(), self.weight.detach().clone(), bias)
