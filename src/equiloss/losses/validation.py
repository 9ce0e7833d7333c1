"""Checks of targets on the host, before a device turns a mistake into an assert without a name."""

from __future__ import annotations

import torch
from torch import Tensor

from equiloss.errors import DataError


def validate_targets(
    target: Tensor, num_classes: int, ignore_index: int | None = None, *, where: str = "target"
) -> None:
    """Raise unless every row of `target` is a class, an ignored row or a distribution.

    The tensor is read back from its device, so this belongs before training, not into a step
    on an accelerator.

    Args:
        target: Classes [N] int64, or probabilities [N, K] of a floating-point type.
        num_classes: K; classes lie in [0, K-1].
        ignore_index: A class that marks rows without a target (None: there are none).
        where: What the rows are called in the message, such as `train target`.

    Raises:
        DataError: for a wrong type or shape, or for the first row that breaks the rule.

    >>> validate_targets(torch.tensor([0, 2, -100]), 3, -100)
    >>> validate_targets(torch.tensor([0, 3]), 3, -100, where="train target")
    Traceback (most recent call last):
    equiloss.errors.DataError: train target 1 is 3: classes lie in [0, 2], or are -100 (ignored)
    """
    if target.is_floating_point():
        _validate_soft(target, num_classes, where)
        return
    if target.dtype != torch.int64:
        raise DataError(
            f"{where}s have dtype {target.dtype}: classes are torch.int64, "
            "class probabilities are of a floating-point type"
        )
    if target.ndim != 1:
        raise DataError(f"{where}s have shape {list(target.shape)}: classes are [N]")
    wrong = (target < 0) | (target >= num_classes)
    ignored = ""
    if ignore_index is not None:
        wrong &= target != ignore_index
        ignored = f", or are {ignore_index} (ignored)"
    if wrong.any():
        row = _first(wrong)
        raise DataError(
            f"{where} {row} is {int(target[row])}: classes lie in [0, {num_classes - 1}]{ignored}"
        )


def _validate_soft(target: Tensor, num_classes: int, where: str) -> None:
    if target.ndim != 2 or target.shape[1] != num_classes:
        raise DataError(
            f"{where}s have shape {list(target.shape)}: class probabilities are [N, {num_classes}]"
        )
    outside = ~((target >= 0) & (target <= 1)).all(dim=1)  # [N, K] -> [N]; NaN is outside too
    if outside.any():
        row = _first(outside)
        raise DataError(
            f"{where} {row} is {_values(target[row])}: class probabilities lie in [0, 1]"
        )
    # K roundings, in the stored type or in float32, in which probabilities are mostly computed.
    epsilon = max(torch.finfo(target.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = num_classes * epsilon
    total = target.double().sum(dim=1)  # [N, K] -> [N]
    off = (total - 1).abs() > tolerance
    if off.any():
        row = _first(off)
        raise DataError(
            f"{where} {row} sums to {total[row]:.6g}: class probabilities sum to 1 "
            f"within {tolerance:.1e}, which is {num_classes} roundings"
        )


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0])


def _values(row: Tensor, most: int = 6) -> str:
    text = ", ".join(f"{value:.4g}" for value in row[:most].tolist())
    return f"[{text}{', …' if len(row) > most else ''}]"
