"""Losses as an author would write them, without an import of equiloss."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def doubled(logits: Tensor, target: Tensor) -> Tensor:
    return 2 * F.cross_entropy(logits, target, reduction="none")


class LearnedTemperature(nn.Module):
    """Cross-entropy of logits divided by a learned temperature."""

    def __init__(self, *, start: float = 1.0) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(start).log())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.log_temperature.exp(), target, reduction="none")


def ends_its_process(logits: Tensor, target: Tensor) -> Tensor:
    if dist.is_initialized():
        os._exit(3)
    return F.cross_entropy(logits, target, reduction="none")


def raises_on_a_rank(logits: Tensor, target: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_rank() == 1:
        raise LookupError("not here")
    return F.cross_entropy(logits, target, reduction="none")
