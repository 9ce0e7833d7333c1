"""Cross-entropy for very many classes, from the head's input instead of the logits.

>>> import torch
>>> features, head_weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
>>> f"{linear_cross_entropy(features, head_weight, torch.tensor([0])).item():.4f}"
'1.3133'
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.losses.signature import describes


@describes(
    reference="Wijmans, Huval, Hertzberg, Koltun & Krähenbühl, 'Cut your losses in "
    "large-vocabulary language models', ICLR 2025"
)
def linear_cross_entropy(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    *,
    head_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of logits that are never all in memory: head and loss in chunks of rows.

        loss = w_y (logsumexp(x) - x_y)        x = features · head_weightᵀ + head_bias

    Value and gradient are those of `cross_entropy` on the logits, up to rounding. The backward
    pass computes each chunk again. It is torch's own `F.linear_cross_entropy`, which would hold
    all logits for label smoothing or soft targets: they are not supported here.

    Args:
        features: The head's input [N, D], float32 or float64.
        head_weight: The head's weight [C, D].
        target: Classes [N] int64.
        head_bias: The head's bias [C].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.
    """
    if len(features) == 0:
        # A rank without a row takes part in the backward pass; there is nothing to cut in chunks.
        logits = F.linear(features, head_weight, head_bias)  # [0, C]
        return F.cross_entropy(logits, target, weight=weight, reduction="none")
    losses: Tensor = F.linear_cross_entropy(
        features,
        head_weight,
        target,
        linear_bias=head_bias,
        weight=weight,
        ignore_index=ignore_index,
        reduction="none",
        options=nn.LinearCrossEntropyOptions(),
    )
    return losses
