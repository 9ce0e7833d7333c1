"""A sigmoid for each class in the place of one softmax over all.

>>> logits, target = torch.tensor([[2.0, -1.0, -3.0]]), torch.tensor([0])
>>> f"{sigmoid_bce(logits, target).item():.4f}"
'0.4888'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.rows import class_of, scaled
from equiloss.losses.signature import describes


@describes(
    soft_targets=True,
    shift_invariant=False,
    reference="Beyer, Hénaff, Kolesnikov, Zhai & van den Oord, 'Are we done with ImageNet?', 2020",
)
def sigmoid_bce(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Binary cross-entropy of each output against the one-hot target, summed over the classes.

        loss = w_y sum_c (softplus(x_c) - t_c x_c)

    Each class is a question of its own, so that one class is not picked at the others' cost. The
    sum, not the mean, keeps a class's gradient, sigmoid(x_c) - t_c, free of their number. Soft
    targets put sum_c w_c t_c in the place of w_y. Sound for every finite logit; not shift
    invariant.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        weight: Weight of each class [C], for whole rows of that class.
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.
    """
    t = target
    if not target.is_floating_point():
        classes = torch.arange(logits.shape[-1], device=logits.device)
        true = class_of(target, ignore_index).unsqueeze(-1)  # [N, 1]
        t = (true == classes).to(logits.dtype)  # [N, C]
    losses = F.binary_cross_entropy_with_logits(logits, t, reduction="none").sum(-1)
    return scaled(losses, target, weight, ignore_index)
