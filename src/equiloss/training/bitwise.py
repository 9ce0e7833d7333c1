"""A step whose bits do not depend on the number of devices: `trainer.reduction=bitwise`.

Floating-point sums depend on their order, and a matrix product of 25 rows may round otherwise than
the first 25 rows of one of 50. So a global batch of n rows is cut into V virtual shards, shard v
being rows n·v//V to n·(v+1)//V, whatever the number of ranks; each is a forward and a backward pass
of its own, and the V results are added in the order of one binary tree. Rank r of W computes shards
V·r//W to V·(r+1)//W.

After EasyScale: Li et al., "EasyScale: Elastic training with consistent accuracy and improved
utilization on GPUs", SC 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from equiloss import randomness
from equiloss.data.sampler import part_of
from equiloss.distributed import collectives, interruption
from equiloss.errors import ConfigError
from equiloss.losses import reduction
from equiloss.losses.projection import Outputs, joined
from equiloss.training.step import Accumulated

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.classifier import Classifier


def tree_sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum of a power of two of tensors in the order of a binary tree.

    It holds log2(V) + 1 of them at a time, as a binary counter holds its digits.

    >>> tree_sum(torch.tensor([1e8, 1.0, -1e8, 1.0]).unbind()).item()  # (1e8 + 1) + (-1e8 + 1)
    0.0
    """
    waiting: list[tuple[int, Tensor]] = []
    for term in terms:
        size, value = 1, term
        while waiting and waiting[-1][0] == size:
            value = waiting.pop()[1] + value
            size *= 2
        waiting.append((size, value))
    ((_, total),) = waiting
    return total


def tree_sum_over_ranks(terms: Iterable[Tensor], shards: int) -> Tensor:
    """Sum over the shards of all ranks, on every rank, in the order of one binary tree.

    Args:
        terms: This rank's shards, in their order.
        shards: V, a power of two: those of all ranks.
    """
    world_size = collectives.world_size()
    if shards % world_size:
        # Ranks own no whole branches: everyone gets all leaves.
        return tree_sum(collectives.gather_rows(torch.stack(list(terms))).unbind())
    value = tree_sum(terms)  # this rank's branch
    distance = 1
    while distance < world_size:
        partner = dist.get_rank() ^ distance
        received = torch.empty_like(value)
        sending = dist.P2POp(dist.isend, value, partner)
        receiving = dist.P2POp(dist.irecv, received, partner)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        # The sum of two is the same in either order.
        value = value + received
        distance *= 2
    return value


class Shards:
    """Gives parameters the gradient of a global batch, the same to the bit on any devices.

    Args:
        module: The classifier.
        shards: V, virtual shards of a global batch.
    """

    of_mean = False
    """As of `MicroBatches`: a shard back-propagates its sum."""

    def __init__(self, module: Classifier, shards: int) -> None:
        self.module = module
        self.shards = shards

    def __call__(self, batch: Batch) -> Accumulated:
        """Forward and backward for this rank's shards; every rank must call it."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        kept: list[Outputs] = []
        leaves = (self._leaf(batch, shard, parameters, kept) for shard in self._mine)
        total, mass, wishes, gradient = tree_sum_over_ranks(leaves, self.shards).tensor_split(
            (1, 2, 3)
        )
        mass = mass.squeeze(0)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, torch.split(gradient, sizes), strict=True):
            mean = reduction.mean(part, mass)
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
        return Accumulated(torch.cat([total, wishes]), mass, joined(kept), batch.target)

    @property
    def _mine(self) -> range:
        world_size = collectives.world_size()
        return range(self.shards)[part_of(self.shards, self.module.global_rank, world_size)]

    def _leaf(
        self, batch: Batch, shard: int, parameters: Sequence[Tensor], kept: list[Outputs]
    ) -> Tensor:
        """One shard's sum of losses, mass, wish to stop and gradient, in one vector."""
        module, criterion = self.module, self.module.criterion
        rows = part_of(batch.rows, shard, self.shards)
        first = part_of(batch.rows, self._mine.start, self.shards).start
        here = slice(rows.start - first, rows.stop - first)
        images, target, index = (field[here] for field in (batch.images, batch.target, batch.index))
        # For layers that draw from the generator; our own dropout belongs to the samples.
        randomness.seed_shard(module.config.seed, module.global_step, shard, module.device)
        with module.row_keys.bound_to(index, batch.epoch):
            outputs = module.outputs(images)  # [n, C, H, W] -> [n, K]
            part = criterion(outputs, target)
            kept.append(outputs.detached())
            gradients = torch.autograd.grad(part.total, parameters, materialize_grads=True)
        total = part.total.detach()
        numbers = (total, part.mass, interruption.wish(total))
        return torch.cat(
            [*(number.view(1) for number in numbers), *(part.flatten() for part in gradients)]
        )


def check_threads() -> None:
    """Refuse ranks with different numbers of CPU threads, which add in different orders.

    Every rank must call it.

    Raises:
        ConfigError: naming the numbers.
    """
    threads = collectives.gather_objects(torch.get_num_threads())
    if len(set(threads)) > 1:
        raise ConfigError(
            f"trainer.reduction=bitwise needs the same number of CPU threads on every rank, "
            f"and they have {', '.join(map(str, threads))}: set trainer.threads"
        )
