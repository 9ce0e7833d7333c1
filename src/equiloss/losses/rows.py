"""Rows of a batch by their targets: the true class, the class's weight, and ignored rows.

A loss that is defined for a class c, l_c(x), is taken over a distribution of classes t as
sum_c t_c l_c(x), so that a class equals its one-hot distribution.
"""

from __future__ import annotations

from torch import Tensor


def of_target(
    per_class: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Each row's loss from the losses that each class would have: [N, C] -> [N].

        classes: w_y l_y, and 0 for ignored rows;   probabilities: sum_c w_c t_c l_c

    Args:
        per_class: l_c of each row [N, C], finite.
        target: Classes [N] int64, or class probabilities [N, C].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows are 0, in value and gradient.

    >>> import torch
    >>> l = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> of_target(l, torch.tensor([1, -100]), torch.tensor([1.0, 10.0])).tolist()
    [20.0, 0.0]
    >>> of_target(l, torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.5, 3.0]
    """
    if target.is_floating_point():
        return (per_class * (target if weight is None else target * weight)).sum(-1)
    true = class_of(target, ignore_index)  # [N]
    return scaled(
        per_class.gather(-1, true.unsqueeze(-1)).squeeze(-1), target, weight, ignore_index
    )


def scaled(
    losses: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Whole rows [N] times the weight of their target, w_y or sum_c w_c t_c; ignored rows are 0."""
    if target.is_floating_point():
        return losses if weight is None else losses * (target * weight).sum(-1)
    if weight is not None:
        losses = losses * weight[class_of(target, ignore_index)]
    return losses.masked_fill(target == ignore_index, 0)


def class_of(target: Tensor, ignore_index: int) -> Tensor:
    """Classes [N] that may serve as an index: ignored rows have class 0."""
    return target.masked_fill(target == ignore_index, 0)
