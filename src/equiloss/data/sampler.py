"""The sampler: which samples form a global batch, and which of them are this rank's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from equiloss.randomness import Stream, keyed_bits


class Slice(NamedTuple):
    """One rank's part of one global batch, as the loader hands it to a source."""

    epoch: int
    """Pass over the split, from 0; it travels with the indices, so workers hold no state."""
    indices: Tensor
    """Positions within the split [lead + n] int64; n may be 0."""
    number: int = 0
    """Number of the global batch in its epoch, from 0."""
    lead: int = 0
    """Whether the first position is only there to be mixed into the second: 0 or 1."""
    rows: int = 0
    """Rows of the global batch."""


def part_of(whole: int, number: int, parts: int) -> slice:
    """Part `number` of so many rows, or of so many shards: contiguous, as equal as parts can be.

    >>> [part_of(5, rank, 3) for rank in range(3)]
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    return slice(whole * number // parts, whole * (number + 1) // parts)


class GlobalBatchSampler(Sampler[Slice]):
    """Slices of global batches that depend on (seed, epoch), and on nothing that ran before.

    Global batch g holds samples g·B to (g+1)·B of the epoch's order, the short last batch
    included. Rank r of W gets rows n·r//W to n·(r+1)//W of a batch of n samples: nothing is
    padded or dropped, slices may be empty, and each rank sees the same number of batches.

    Args:
        length: Samples of the split.
        batch_size: B, samples per batch over all ranks.
        seed: Seed of the order.
        shuffle: Whether the order is random; otherwise it is that of the split.
        rank: This rank.
        world_size: W, the number of ranks.
        lead: Whether each slice that has a row also has the one before it in the global batch
            (before the first one the last), for what mixes neighbours.
        shards: Virtual shards that a batch is divided by, and a slice so holds whole; None: rows.

    >>> sampler = GlobalBatchSampler(5, 4, shuffle=False, rank=1, world_size=2)
    >>> [part.indices.tolist() for part in sampler]
    [[2, 3], [4]]
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        lead: bool = False,
        shards: int | None = None,
    ) -> None:
        assert length > 0
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.lead = lead
        self.shards = shards
        self.epoch = 0
        self.start_batch = 0
        """Batches that the next iteration, and that one alone, skips."""
        # Lightning calls set_epoch on `loader.batch_sampler.sampler`.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """The epoch's order of the whole split: a permutation [length] int64."""
        positions = torch.arange(self.length)
        if not self.shuffle:
            return positions
        # Sorting hashes is a permutation that no change of torch's generators can alter.
        bits = keyed_bits(self.seed, self.epoch, positions, 1, stream=Stream.ORDER)  # [length, 1]
        return bits.squeeze(1).argsort(stable=True)

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def __iter__(self) -> Iterator[Slice]:
        epoch, first = self.epoch, self.start_batch
        self.start_batch = 0
        batches = torch.split(self.order(), self.batch_size)
        for number, batch in enumerate(batches[first:], start=first):
            rows = self._own_rows(len(batch))
            # A copy: a view sent to a worker process would take the whole order along.
            indices = batch[rows].clone()
            lead = int(self.lead and len(indices) > 0)
            if lead:
                indices = torch.cat([batch[rows.start - 1].view(1), indices])
            yield Slice(epoch, indices, number, lead, len(batch))

    def _own_rows(self, rows: int) -> slice:
        """This rank's rows of a global batch."""
        if self.shards is None:
            return part_of(rows, self.rank, self.world_size)
        shards = part_of(self.shards, self.rank, self.world_size)
        first, last = (part_of(rows, n, self.shards).start for n in (shards.start, shards.stop))
        return slice(first, last)
