"""Losses that wrong labels mislead less: generalised and symmetric cross-entropy.

>>> logits, target = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
>>> got = generalized_cross_entropy(logits, target), symmetric_cross_entropy(logits, target)
>>> [f"{loss.item():.4f}" for loss in got]
['0.3617', '1.4057']
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.options import require
from equiloss.losses.rows import of_target, scaled
from equiloss.losses.signature import describes


@describes(
    soft_targets=True,
    reference="Zhang & Sabuncu, 'Generalized cross entropy loss for training deep neural networks "
    "with noisy labels', NeurIPS 2018",
)
def generalized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """From cross-entropy (q = 0) to the mean absolute error 1 - p_y (q = 1).

        loss = w_y (1 - p_y^q) / q        p = softmax(x)

    q = 0 is the limit, -log p_y. The larger q, the less a row that looks wrong pulls: its slope
    has a factor p_y^q. Soft targets: sum_c w_c t_c l_c. Sound for every finite logit.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        q: In [0, 1].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N]; at most w_y / q.

    Raises:
        LossError: for a q outside [0, 1].
    """
    require(0 <= q <= 1, "loss.q must lie in [0, 1]", q)
    log_p = F.log_softmax(logits, dim=-1)  # [N, C]
    return of_target(
        -log_p if q == 0 else -torch.expm1(q * log_p) / q, target, weight, ignore_index
    )


@describes(
    soft_targets=True,
    reference="Wang, Ma, Chen, Luo, Yi & Bailey, 'Symmetric cross entropy for robust learning "
    "with noisy labels', ICCV 2019",
)
def symmetric_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of target and prediction, and of prediction and target.

        loss = α w_y (-log p_y) + β w_y (-sum_c p_c log t_c)        p = softmax(x), log 0 := A

    For classes the second sum is -A (1 - p_y). Soft targets: no log t_c is taken below A, and
    weights enter as sum_c w_c t_c (-log p_c) on the left, sum_c w_c t_c on the right. β = 0 is α
    times cross-entropy. Sound for every finite logit.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        alpha: α, at least 0.
        beta: β, at least 0.
        log_zero: A, below 0: what stands for log 0.
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for an option outside its range.
    """
    require(0 <= alpha < math.inf, "loss.alpha must be finite and at least 0", alpha)
    require(0 <= beta < math.inf, "loss.beta must be finite and at least 0", beta)
    require(-math.inf < log_zero < 0, "loss.log_zero must be finite and below 0", log_zero)
    log_p = F.log_softmax(logits, dim=-1)  # [N, C]
    forward = of_target(-log_p, target, weight, ignore_index)
    if target.is_floating_point():
        reverse = -(log_p.exp() * target.log().clamp(min=log_zero)).sum(-1)
        return alpha * forward + beta * scaled(reverse, target, weight)
    reverse = of_target(log_zero * torch.expm1(log_p), target, weight, ignore_index)
    return alpha * forward + beta * reverse
