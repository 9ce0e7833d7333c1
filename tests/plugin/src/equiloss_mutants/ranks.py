"""A mistake that shows on several processes."""

import torch.distributed as dist
import torch.nn.functional as F


def mean_of_ranks(logits, target):
    """It averages over ranks, as if the caller did not."""
    losses = F.cross_entropy(logits, target, reduction="none")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return losses / world_size
