"""The sum of gradients over ranks, and the few numbers of a step that travel with it.

A sum of their own would have ranks wait for each other once more in each step. Here the numbers
are the gradient of a parameter that torch sums with the others, and that is nobody's: no
optimizer, checkpoint or count knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equiloss.distributed import collectives


class _Travelling(torch.autograd.Function):
    """A loss whose backward pass gives a parameter some numbers for its gradient.

    It also reaches the parameters that the loss does not depend on: DistributedDataParallel waits
    for each, and one that is reached without a gradient counts as 0.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, numbers: Tensor, _carrier: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.numbers, ctx.others = numbers, len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *gradient, None, ctx.numbers, *[None] * ctx.others


class GradientSums:
    """Has data-parallel training sum gradients in one order, and two numbers with them."""

    def __init__(self) -> None:
        self._carrier: nn.Parameter | None = None
        self.numbers: Tensor | None = None
        """Those of this rank."""

    @contextmanager
    def joining(self, module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
        """Have a parameter more [2] in a module while torch wraps it for data-parallel training."""
        device = next(module.parameters()).device
        self._carrier = nn.Parameter(torch.zeros(2, dtype=dtype, device=device))
        module.register_parameter("travels_with_gradients", self._carrier)
        try:
            yield
        finally:
            del module.travels_with_gradients

    def settle(self, model: nn.Module | None) -> None:
        """Have gradients summed in the same order from the first step on.

        DistributedDataParallel fills its buckets anew in the order in which its first backward
        pass brought the gradients. Where three ranks or more add up, the place in a bucket decides
        the order of a sum, and so its rounding: a run that goes on would take its first step with
        others. Here a backward pass of zeros comes before, the last parameter first. (Hooks of
        parameters see it.)

        Args:
            model: What the ranks train; nothing is done where it is on one.
        """
        if not isinstance(model, DistributedDataParallel):
            return
        parameters = [p for p in model.module.parameters() if p.requires_grad][::-1]
        parameters += [self._carrier] if self._carrier is not None else []
        model.reducer.prepare_for_backward([])
        torch.autograd.backward(parameters, [torch.zeros_like(p) for p in parameters])
        model.zero_grad()

    def start(self, loss: Tensor, numbers: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The loss whose backward pass sums numbers [2] over ranks; every rank must call it.

        Args:
            loss: 0-dim.
            numbers: In the dtype of `joining`.
            parameters: All that learn, also those that the loss does not depend on.
        """
        self.numbers = numbers
        if self._carrier is None:
            return loss
        self._carrier.grad = None
        # The gradients of ranks are averaged.
        numbers = numbers * collectives.world_size()
        travelling: Tensor = _Travelling.apply(loss, numbers, self._carrier, *parameters)
        return travelling

    def finish(self) -> Tensor:
        """The sums [2] after the backward pass; on one device the numbers themselves."""
        sums = self.numbers if self._carrier is None else self._carrier.grad
        assert sums is not None
        return sums
