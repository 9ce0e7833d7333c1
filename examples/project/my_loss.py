"""A loss of one's own: one value for each row, never reduced."""

import torch.nn.functional as F
from torch import Tensor


def squared_hinge(logits: Tensor, target: Tensor, *, margin: float = 1.0) -> Tensor:
    """Square of what each wrong class lacks of the margin: [N, C], [N] -> [N]."""
    own = logits.gather(-1, target.unsqueeze(-1))  # [N, 1]
    short = F.relu(margin - own + logits) ** 2  # [N, C]
    return short.scatter(-1, target.unsqueeze(-1), 0).sum(-1)  # the class itself lacks nothing
