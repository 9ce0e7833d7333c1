"""Batch normalisation over the rows of all ranks: the statistics of the global batch, anywhere.

`torch.nn.SyncBatchNorm` does so on GPUs alone. A rank may hold any number of rows, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equiloss.distributed import collectives


def is_in(model: nn.Module) -> bool:
    """Whether a network has batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def is_torchs(model: nn.Module) -> bool:
    """Whether a network's batch normalisation is torch's own, and nothing made from it.

    torch's conversion to `SyncBatchNorm` forgets what a class of another library does besides.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    return all(kind.__module__.startswith("torch.nn.") for kind in kinds)


def synchronise(model: nn.Module) -> None:
    """Have a network's batch normalisation take its statistics over all ranks, in place.

    Parameters, buffers and their names stay. Alone, and in evaluation, a layer is torch's own.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _OverRanks):
            kind = type(module)
            # A class with a forward pass of its own keeps it, and calls the one below.
            module.__class__ = type(kind.__name__, (kind, _OverRanks), {})


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return collectives.sum_over_ranks(value)

    @staticmethod
    def backward(_: Any, *gradient: Tensor) -> Tensor:
        return collectives.sum_over_ranks(*gradient)


class _OverRanks(_BatchNorm):
    """Makes a batch normalisation of torch.nn take its statistics over all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        """Normalise [n, C, …] over its rows of all ranks, and every axis but the second.

        Raises:
            ValueError: for a global batch of one value per channel, as torch does.
        """
        if not self.training or collectives.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        channels = input.shape[1]
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, channels, *[1] * (input.dim() - 2)]
        values = wide.new_full((1,), input.numel() // channels)  # of a channel, on this rank
        total: Tensor = _SumOverRanks.apply(torch.cat([wide.sum(axes), values]))
        count = total[-1].item()
        if count <= 1:
            raise ValueError("batch normalisation of a step with one value per channel")
        mean = total[:-1] / count
        # A second pass: in a difference of squares, values far from 0 would lose their digits.
        centred = wide - mean.view(shape)
        squares: Tensor = _SumOverRanks.apply(centred.square().sum(axes))
        variance = squares / count
        self._learn(mean, squares / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        normalised = centred * scale.view(shape)
        if self.bias is not None:
            normalised = normalised + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _learn(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as torch does: they are the same on every rank."""
        if self.running_mean is None or self.running_var is None:
            return
        part = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if part is None:
                part = 1.0 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), part or 0.0)
        self.running_var.lerp_(variance.to(self.running_var.dtype), part or 0.0)
