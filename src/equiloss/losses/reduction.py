"""The only code that turns sums over ranks into one loss.

    loss = sum of per-sample losses / mass        over all ranks and micro-batches

Data-parallel training averages gradients over its W ranks. So each rank back-propagates, for
each micro-batch, W · total / global mass: the average is then the gradient of the loss above,
however the rows are spread. Averaging local means instead weights each rank alike, whatever the
mass of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equiloss.distributed import collectives


def mean(total: Tensor, mass: Tensor) -> Tensor:
    """Total / mass, and 0 where the mass is 0 (PyTorch's mean would be NaN).

    >>> mean(torch.tensor(6.0), torch.tensor(4.0)).item()
    1.5
    >>> mean(torch.tensor(0.0), torch.tensor(0.0)).item()
    0.0
    """
    # The divisor is made safe first: in 0 / 0 the gradient would be NaN behind any `where`.
    quotient = total / torch.where(mass > 0, mass, torch.ones_like(mass))
    return torch.where(mass > 0, quotient, torch.zeros_like(quotient))


def rank_loss(total: Tensor, global_mass: Tensor) -> Tensor:
    """What one rank back-propagates for one micro-batch: W · total / global mass, 0-dim.

    Args:
        total: Sum of this micro-batch's per-sample losses, 0-dim, with its graph.
        global_mass: Mass of the global batch: all ranks, all micro-batches.
    """
    return mean(collectives.world_size() * total, global_mass)
