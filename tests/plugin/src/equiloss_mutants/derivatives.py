"""Mistakes about gradients, and far out."""

import torch
import torch.nn.functional as F
from torch import nn


def detached(logits, target):
    return F.cross_entropy(logits.detach(), target, reduction="none")


def half_detached(logits, target, *, gamma: float = 2.0):
    """Focal loss, whose factor is taken for a constant."""
    losses = F.cross_entropy(logits, target, reduction="none")
    p = (-losses).exp().detach()
    return (1 - p) ** gamma * losses


class FrozenParameter(nn.Module):
    """A temperature that is said to be learned, and never is."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, logits, target):
        return F.cross_entropy(logits / self.temperature.item(), target, reduction="none")


class Forgetful(nn.Module):
    """A random direction that belongs to what was learned, and is not saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("offset", torch.rand(()), persistent=False)

    def forward(self, logits, target):
        losses = F.cross_entropy(logits * (1 + self.offset), target, reduction="none")
        return self.scale * losses


def detached_head(features, head_weight, target):
    return F.cross_entropy(features @ head_weight.detach().T, target, reduction="none")


def without_bias(features, head_weight, target, *, head_bias=None):
    return F.cross_entropy(features @ head_weight.T, target, reduction="none")


def infinite(logits, target):
    """Softmax underflows, and nothing says where."""
    return F.nll_loss(logits.softmax(-1).log(), target, reduction="none")


def infinite_gradient(logits, target):
    """The square root of 1 - p has an infinite slope at p = 1."""
    losses = F.cross_entropy(logits, target, reduction="none")
    return (1 - (-losses).exp()).sqrt() * losses


def penalty(logits, target):
    """It pulls the logits towards 0, and does not say so."""
    return F.cross_entropy(logits, target, reduction="none") + 1e-3 * logits.square().sum(-1)
