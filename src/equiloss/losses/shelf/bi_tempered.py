"""The bi-tempered logistic loss: a softmax with heavy tails, and a logarithm that is bounded.

With the tempered functions, which at t = 1 are the usual ones,

    log_t(u) = (u^(1-t) - 1) / (1 - t)        exp_t(u) = max(0, 1 + (1 - t) u)^(1 / (1 - t))

>>> logits, target = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
>>> f"{bi_tempered(logits, target).item():.4f}"
'0.3472'
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.options import require
from equiloss.losses.rows import of_target, scaled
from equiloss.losses.signature import describes

# Newton's steps to the root in float64, over t in [0.1, 5] and up to 20,000 classes: at most 12,
# where t is 0.1; at most 9 from t = 0.3 on.
NEWTON_STEPS = 12


@describes(
    soft_targets=True,
    reference="Amid, Warmuth, Anil & Koren, 'Robust bi-tempered logistic loss based on Bregman "
    "divergences', NeurIPS 2019",
)
def bi_tempered(
    logits: Tensor,
    target: Tensor,
    *,
    t1: float = 0.8,
    t2: float = 1.2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Divergence between target and prediction, bounded (t1 < 1), with heavy tails (t2 > 1).

        loss = w_y (-log_t1 p_y - (1 - sum_c p_c^(2 - t1)) / (2 - t1))
        p_c  = exp_t2(x_c - λ),   λ such that p sums to 1

    t1 = t2 = 1 is cross-entropy. Soft targets t add sum_c t_c log_t1 t_c, and -t_c^(2 - t1)
    beside each p_c^(2 - t1), as the paper defines it, so that the loss is 0 where p = t; at
    t1 = t2 = 1 that is cross-entropy less the entropy of t. Their weights enter as sum_c w_c t_c.

    λ is found by Newton's method on log_t2 of the sum, which is convex and falls, so that every
    step comes closer from the same side. With t2 > 1 (and 1) the loss is sound for every finite
    logit. With t2 < 1 classes far below the largest have p = 0 exactly: the loss stays finite, and
    there it has no gradient.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        t1: Temperature of the logarithm, in [0, 1].
        t2: Temperature of the softmax, in [t1, 5], at least 0.1. Below t1 the slope of a class
            with p = 0 would be infinite; above 5 its powers leave float32 with many classes.
        weight: Weight of each class [C], for whole rows of that class.
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N]; for classes and t1 < 1 at most w_y / (1 - t1).

    Raises:
        LossError: for temperatures outside their ranges.
    """
    require(0 <= t1 <= 1, "loss.t1 must lie in [0, 1]", t1)
    require(max(t1, 0.1) <= t2 <= 5, f"loss.t2 must lie in [{max(t1, 0.1)}, 5]", t2)
    log_p = log_tempered_softmax(logits, t2)  # [N, C]
    s = 1 - t1
    # log_t1 p, to full precision also as t1 approaches 1.
    tempered = log_p if s == 0 else torch.expm1(s * log_p) / s
    # (sum_c p_c^(2 - t1) - 1) / (2 - t1), where p sums to 1.
    rest = 0 if s == 0 else (log_p.exp() * tempered).sum(-1) * (s / (1 + s))
    if target.is_floating_point():
        # Without p: sum_c t_c log_t1 t_c - (sum_c t_c^(2 - t1) - 1) / (2 - t1).
        log_t = torch.where(target > 0, target, 1).log()
        own = (log_t if s == 0 else torch.expm1(s * log_t) / s) / (1 + s)
        losses = (target * (own - tempered)).sum(-1) + rest
        return scaled(losses, target, weight)
    losses = of_target(-tempered, target, ignore_index=ignore_index) + rest
    return scaled(losses, target, weight, ignore_index)


def log_tempered_softmax(logits: Tensor, t: float) -> Tensor:
    """Logarithm of exp_t(x - λ), λ such that it sums to 1: [N, C]; -inf for p = 0, where t < 1.

    Differentiable twice: the root is found without gradient, and Newton's last two steps, which
    do not move it any more, carry the first and second derivative.

    Args:
        logits: Scores [N, C].
        t: Temperature, in [0.1, 5].

    >>> log_tempered_softmax(torch.tensor([[0.0, 1.0]]), 2.0).exp().sum().item()
    1.0
    """
    if t == 1:
        return F.log_softmax(logits, dim=-1)
    below = logits - logits.detach().amax(-1, keepdim=True)  # [N, C], at most 0
    fixed = below.detach()
    shift = torch.zeros_like(fixed[..., :1])  # [N, 1]; the root is not below
    for step in range(NEWTON_STEPS):
        shift = _newton(below if step >= NEWTON_STEPS - 2 else fixed, shift, t)
    return _log_exp(below - shift, t)


def _newton(below: Tensor, shift: Tensor, t: float) -> Tensor:
    """One step towards log_t(sum_c exp_t(x_c - shift)) = 0."""
    log_e = _log_exp(below - shift, t)  # [N, C]
    total = log_e.exp().sum(-1, keepdim=True)
    value = torch.expm1((1 - t) * total.log()) / (1 - t)
    slope = (t * (log_e - total.log())).exp().sum(-1, keepdim=True)  # falls by this much
    return shift + value / slope


def _log_exp(u: Tensor, t: float) -> Tensor:
    """Logarithm of exp_t(u), for t other than 1."""
    inside = (1 - t) * u > -1
    # Chosen twice: a slope of log at 0 would be NaN behind the second choice alone.
    grown = torch.where(inside, (1 - t) * u, 0)
    return torch.where(inside, torch.log1p(grown) / (1 - t), -math.inf)
