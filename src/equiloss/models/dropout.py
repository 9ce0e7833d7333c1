"""Dropout whose masks belong to the samples, not to the batch that they are in.

torch draws a mask for the rows of one forward pass, so the mask of a sample depends on the rank
and the micro-batch that it is in, and on every draw before. Here it is a function of (seed, epoch,
sample, layer): the same for every split of the batch, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.randomness import Stream, keyed_bernoulli, keyed_bits


class RowKeys:
    """Keys of the rows in a forward pass, from which dropout layers draw their masks.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.layers: list[KeyedDropout] = []
        """Who draws from the keys."""
        self._bound: tuple[Tensor, int] | None = None
        self._keys: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """Hashed key of each row [n] int64, while a training step is under way."""
        if self._keys is None and self._bound is not None:
            bits = keyed_bits(self.seed, self._bound[1], self._bound[0], 1, stream=Stream.DROPOUT)
            self._keys = bits.squeeze(1)
        return self._keys

    @contextmanager
    def bound_to(self, index: Tensor, epoch: int) -> Iterator[None]:
        """Key a forward (and backward) pass by its samples: positions in the split [n]."""
        self._bound = index, epoch
        if any(layer.p > 0 for layer in self.layers):
            _ = self.keys  # now: compiled code is to find them made
        try:
            yield
        finally:
            self._bound = self._keys = None


class KeyedDropout(nn.Dropout):
    """`torch.nn.Dropout` with masks by sample: a value is 0 with probability p, else x / (1 - p).

    Outside of a training step it is torch's own. A layer that a forward pass uses twice has the
    same mask both times.

    Args:
        p: Probability that a value is dropped.
        row_keys: Keys of the rows in the forward pass.
        layer: Number of the layer, which its masks depend on.

    Raises:
        RuntimeError: (in a training step) for an input whose first axis is not the rows'.

    >>> import torch
    >>> keys = RowKeys(seed=0)
    >>> layer, images = KeyedDropout(0.5, keys, layer=0), torch.ones(4, 8)
    >>> with keys.bound_to(torch.tensor([7, 1, 5, 3]), epoch=0):
    ...     together = layer(images)
    >>> with keys.bound_to(torch.tensor([5]), epoch=0):
    ...     torch.equal(layer(images[:1]), together[2:3])
    True
    """

    def __init__(self, p: float, row_keys: RowKeys, layer: int) -> None:
        super().__init__(p)
        self.row_keys = row_keys
        self.layer = layer
        row_keys.layers.append(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        """Drop in training: any shape whose first axis is the rows', [n, …] -> [n, …]."""
        keys = self.row_keys.keys if self.training and self.p > 0 else None
        if keys is None:
            return super().forward(input)
        if input.shape[:1] != keys.shape:
            raise RuntimeError(
                f"dropout on {list(input.shape)} in a forward pass of {len(keys)} rows: its first "
                "axis must be the rows'"
            )
        return self._dropped(input, keys, input.shape)

    def _dropped(self, values: Tensor, keys: Tensor, shape: Sequence[int]) -> Tensor:
        """Values [n, …] times a mask of some shape, [n, …] or 1 in the place of an axis."""
        draw = _opaque_bernoulli if torch.compiler.is_compiling() else keyed_bernoulli
        dropped = draw(self.p, keys, self.layer, math.prod(shape[1:]))  # [n, draws]
        kept = (~dropped).view(shape).to(values.dtype)
        return values * kept * (1 / (1 - self.p) if self.p < 1 else 0.0)


class KeyedStochasticDepth(KeyedDropout):
    """A residual branch that is 0 for a sample with probability p, else x / (1 - p).

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016; torchvision's StochasticDepth
    by row, and timm's DropPath. Where the first axis is not the rows', it draws as they do.

    >>> import torch
    >>> keys = RowKeys(seed=0)
    >>> layer, branch = KeyedStochasticDepth(0.5, keys, layer=0), torch.ones(4, 8)
    >>> with keys.bound_to(torch.arange(4), epoch=0):
    ...     sorted({tuple(row.unique().tolist()) for row in layer(branch)})
    [(0.0,), (2.0,)]
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        """Drop in training: [n, …] -> [n, …]."""
        if not self.training or self.p == 0:
            return input
        keys, shape = self.row_keys.keys, [len(input)] + [1] * (input.dim() - 1)
        if keys is None or input.shape[:1] != keys.shape:
            return input * F.dropout(input.new_ones(shape), self.p)
        return self._dropped(input, keys, shape)


@torch.library.custom_op("equiloss::keyed_bernoulli", mutates_args=())
def _opaque_bernoulli(p: float, keys: Tensor, number: int, draws: int) -> Tensor:
    """`keyed_bernoulli` as one operator: compiled for a CPU its parts crash, or cannot be built."""
    return keyed_bernoulli(p, keys, number, draws)


@_opaque_bernoulli.register_fake
def _(_p: float, keys: Tensor, _number: int, draws: int) -> Tensor:
    return keys.new_empty((keys.shape[0], draws), dtype=torch.bool)


def key_dropout(model: nn.Module, row_keys: RowKeys) -> None:
    """Replace what drops values, or rows of a residual branch, by what has masks by sample."""
    places: list[tuple[nn.Module, str, float, type[KeyedDropout]]] = []
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                places.append((module, name, child.p, KeyedDropout))
            elif (rate := _depth_rate(child)) is not None:
                places.append((module, name, rate, KeyedStochasticDepth))
    # Dropout comes first: its numbers, and so its masks, are those of earlier versions.
    places.sort(key=lambda place: place[3] is KeyedStochasticDepth)
    for layer, (module, name, rate, kind) in enumerate(places):
        setattr(module, name, kind(rate, row_keys, layer))


def _depth_rate(module: nn.Module) -> float | None:
    """Probability of a layer that drops rows of a branch and scales the others; else None."""
    kind = f"{type(module).__module__}.{type(module).__name__}"  # without importing either library
    if kind == "torchvision.ops.stochastic_depth.StochasticDepth" and module.mode == "row":
        return float(cast(float, module.p))
    if kind == "timm.layers.drop.DropPath" and module.scale_by_keep:
        return float(cast(float, module.drop_prob))
    return None
