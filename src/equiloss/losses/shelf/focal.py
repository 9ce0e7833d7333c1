"""Cross-entropy with more or less weight on rows that are right already: focal and poly-1.

Both take log p from log-softmax, and 1 - p never from a rounded p.

>>> logits, target = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
>>> f"{focal(logits, target).item():.4f} {poly1(logits, target).item():.4f}"
'0.0485 0.7580'
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.options import require
from equiloss.losses.rows import of_target
from equiloss.losses.signature import describes


@describes(
    soft_targets=True,
    reference="Lin, Goyal, Girshick, He & Dollár, 'Focal loss for dense object detection', "
    "ICCV 2017",
)
def focal(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy that counts a row less the surer its true class already is.

        loss = -w_y (1 - p_y)^γ log p_y        p = softmax(x)

    γ = 0 is cross-entropy. The paper's α is `weight`. Soft targets: sum_c w_c t_c l_c. Sound for
    every finite logit, also for γ < 1, where a power of a rounded 1 - p would have an infinite
    slope: 1 - p_y is taken as the sum of the other classes' probabilities, in logarithms.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        gamma: γ, at least 0.
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for a γ below 0.
    """
    require(0 <= gamma < math.inf, "loss.gamma must be finite and at least 0", gamma)
    log_p = F.log_softmax(logits, dim=-1)  # [N, C]
    modulation = (gamma * _log_of_others(log_p)).exp()
    return of_target(-modulation * log_p, target, weight, ignore_index)


@describes(
    soft_targets=True,
    reference="Leng, Tan, Liu, Cubuk, Shi, Cheng & Anguelov, 'PolyLoss: A polynomial expansion "
    "perspective of classification loss functions', ICLR 2022",
)
def poly1(
    logits: Tensor,
    target: Tensor,
    *,
    epsilon: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy whose series in 1 - p has another first coefficient.

        loss = w_y (-log p_y + ε (1 - p_y))        p = softmax(x)

    ε = 0 is cross-entropy. Soft targets: sum_c w_c t_c l_c. Sound for every finite logit.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        epsilon: ε, at least -1; below that the loss would fall as p_y leaves 1.
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for an ε below -1.
    """
    require(-1 <= epsilon < math.inf, "loss.epsilon must be finite and at least -1", epsilon)
    log_p = F.log_softmax(logits, dim=-1)  # [N, C]
    return of_target(-log_p - epsilon * torch.expm1(log_p), target, weight, ignore_index)


def _log_of_others(log_p: Tensor) -> Tensor:
    """log(1 - p_c) of each class [N, C], to full precision where p_c is near 1."""
    top = log_p.argmax(-1, keepdim=True)  # the only class that may be near 1
    # Not -inf, so that a single class, without others, meets no inf - inf.
    nothing = torch.finfo(log_p.dtype).min
    others = log_p.scatter(-1, top, nothing)  # [N, C]
    return torch.log1p(-others.exp()).scatter(-1, top, others.logsumexp(-1, keepdim=True))
