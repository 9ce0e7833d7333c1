"""Sums, maxima and gathered rows over the ranks of the process group; alone, the values themselves.

Every rank must call them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class PendingSum(NamedTuple):
    """A sum over ranks that may still be on its way."""

    value: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The sum over all ranks."""
        if self.work is not None:
            self.work.wait()
        return self.value


def world_size() -> int:
    """Ranks of the process group, or 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank in the process group, or 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def start_sum(value: Tensor) -> PendingSum:
    """Begin to sum a tensor over ranks, while the caller goes on computing.

    Every rank must call it in the same order. The argument is left as it is.
    """
    value = value.detach().clone()
    if world_size() == 1:
        return PendingSum(value, None)
    return PendingSum(value, dist.all_reduce(value, async_op=True))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over ranks."""
    return start_sum(value).wait()


def max_over_ranks(value: Tensor) -> Tensor:
    """Element-wise maximum of a tensor over ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every rank the first rank's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [n_r, …] -> [sum of n_r, …].

    Ranks may hold different numbers of rows, or none.
    """
    if world_size() == 1:
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    # Collectives want equal shapes: pad to the longest, and cut after.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order: plain data and tensors, pickled on its way."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
