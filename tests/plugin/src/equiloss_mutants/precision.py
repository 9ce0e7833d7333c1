"""Mistakes about precision."""

import torch
import torch.nn.functional as F
from torch import nn


class DtypeOfParameter(nn.Module):
    """It follows its parameter's dtype, which is bfloat16 in `bf16-true`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, logits, target):
        scaled = self.scale * logits.to(self.scale.dtype)
        return F.cross_entropy(scaled, target, reduction="none")


def bfloat16_inside(logits, target):
    if logits.dtype == torch.float32:
        logits = logits.bfloat16()
    return F.cross_entropy(logits, target, reduction="none").to(
        torch.promote_types(logits.dtype, torch.float32)
    )
