"""Dropout whose masks belong to the samples, not to the batch that they are in.

torch draws a mask for the rows of one forward pass, so the mask of a sample depends on the rank
and the micro-batch that it is in, and on every draw before. Here it is a function of (seed, epoch,
sample, layer): the same for every split of the batch, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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
        draw = _opaque_bernoulli if torch.compiler.is_compiling() else keyed_bernoulli
        dropped = draw(self.p, keys, self.layer, math.prod(input.shape[1:]))  # [n, values]
        kept = (~dropped).view(input.shape).to(input.dtype)
        return input * kept * (1 / (1 - self.p) if self.p < 1 else 0.0)


@torch.library.custom_op("equiloss::keyed_bernoulli", mutates_args=())
def _opaque_bernoulli(p: float, keys: Tensor, number: int, draws: int) -> Tensor:
    """`keyed_bernoulli` as one operator: compiled for a CPU its parts crash, or cannot be built."""
    return keyed_bernoulli(p, keys, number, draws)


@_opaque_bernoulli.register_fake
def _(_p: float, keys: Tensor, _number: int, draws: int) -> Tensor:
    return keys.new_empty((keys.shape[0], draws), dtype=torch.bool)


def key_dropout(model: nn.Module, row_keys: RowKeys) -> None:
    """Replace every `torch.nn.Dropout` of a network by a `KeyedDropout`."""
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Dropout
    ]
    for layer, (module, name, child) in enumerate(places):
        setattr(module, name, KeyedDropout(child.p, row_keys, layer))
