"""Taylor cross-entropy: the first terms of the series of -log p around p = 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def taylor_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    order: int = 2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy cut off after so many terms, so that wrong labels pull less.

        loss = w_y sum_{i=1..order} (1 - p_y)^i / i        p = softmax(x)

    order = 1 is the mean absolute error 1 - p_y; with ever more terms it becomes cross-entropy.

    Args:
        logits: Unnormalised scores [N, C].
        target: Classes [N] int64.
        order: Number of terms, at least 1.
        weight: Weight of each class [C].
        ignore_index: Class whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        ValueError: for an order below 1.
    """
    if order < 1:
        raise ValueError(f"loss.order must be at least 1, got {order}")
    ignored = target == ignore_index
    true = target.masked_fill(ignored, 0)  # [N], each an index
    log_p = F.log_softmax(logits, dim=-1).gather(-1, true.unsqueeze(-1)).squeeze(-1)  # [N]
    missing = -torch.expm1(log_p)  # 1 - p, to full precision where p is near 1
    losses = torch.zeros_like(missing)
    for term in range(order, 0, -1):  # Horner's scheme
        losses = missing * (1 / term + losses)
    if weight is not None:
        losses = losses * weight[true]
    return losses.masked_fill(ignored, 0)


# What a signature cannot say is an attribute; `equiloss losses` shows this one.
taylor_cross_entropy.reference = (  # type: ignore[attr-defined]
    "Feng, Shu, Lin, Lv, Li & An, 'Can cross entropy loss be robust to label noise?', IJCAI 2020"
)
