"""Shrinking of a counter-example: fewest rows, fewest classes, roundest numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch

from equiloss.conformance.case import Case, literal, one_hot

_T = TypeVar("_T")

# More logits, rows or classes than these are not tried one by one.
FEW = 40


def shrink(
    case: Case,
    mistake: _T,
    mistake_of: Callable[[Case], _T | None],
    tries: int,
    fixed_classes: int | None = None,
) -> tuple[Case, _T]:
    """Make a call smaller for as long as it stays wrong.

    Args:
        case: A call that is wrong.
        mistake: What is wrong with it.
        mistake_of: What is wrong with a smaller call; None if nothing is.
        tries: The most calls to make.
        fixed_classes: The only number of classes that the loss takes, if there is one.

    Returns:
        The smallest call found, and what is wrong with it.

    >>> from equiloss.conformance.case import batch
    >>> large = lambda case: "large" if (case.logits > 1).any() else None
    >>> case, _ = shrink(batch(5, 4), "large", large, 200)
    >>> case.logits.tolist(), case.target.tolist()
    ([[0.0, 2.0]], [0])
    """
    while True:
        size = _size(case)
        for candidate in _candidates(case, fixed_classes):
            if _size(candidate) >= size:
                continue
            if tries == 0:
                return case, mistake
            tries -= 1
            other = mistake_of(candidate)
            if other is not None:
                case, mistake = candidate, other
                break
        else:
            return case, mistake


def _size(case: Case) -> tuple[int, int, int, int]:
    """Size of a call, which orders calls: rows, classes, options, and digits of all numbers."""
    dtype = case.logits.dtype
    numbers = [*case.logits.flatten().tolist(), *(case.weight or ())]
    if case.soft:
        numbers += case.target.flatten().tolist()
    digits = sum(_digits(value, dtype) for value in numbers)
    labels = 0 if case.soft else int((case.target != 0).sum())
    return case.rows, case.classes, len(case.options()), digits + labels


@lru_cache(maxsize=10_000)
def _digits(value: float, dtype: torch.dtype) -> int:
    """Length of a number as it is written; that of 0 is less than that of 1."""
    return len(literal(value, dtype).removesuffix(".0")) + (value != 0)


def _candidates(case: Case, fixed_classes: int | None) -> Iterator[Case]:
    """Cases that may be smaller than this one, with the largest steps first."""
    rows = list(range(case.rows))
    if len(rows) > 2:
        half = len(rows) // 2
        yield case.select(rows[:half])
        yield case.select(rows[half:])
    if len(rows) > 1:
        for row in rows:
            yield case.select([other for other in rows if other != row])
    if fixed_classes is None:
        for part in (2, case.classes // 2, case.classes * 3 // 4):
            yield from _without(case, list(range(part, case.classes)))
        if case.classes <= FEW:
            for label in reversed(range(case.classes)):
                yield from _without(case, [label])
    yield replace(case, weight=None)
    yield replace(case, label_smoothing=0.0)
    if case.soft or case.ignore_index not in case.target.tolist():
        yield replace(case, ignore_index=None)
    yield from _rounded(case)


def _without(case: Case, dropped: list[int]) -> Iterator[Case]:
    """The case without some classes, where that leaves two or more."""
    kept = [label for label in range(case.classes) if label not in dropped]
    ignored = case.ignore_index
    if len(kept) < 2 or (ignored is not None and ignored >= kept[-1]):
        return
    weight = None if case.weight is None else tuple(case.weight[label] for label in kept)
    if case.soft:
        left = case.target[:, kept]
        total = left.sum(-1, keepdim=True)
        target = torch.where(total > 0, left / total, 1 / len(kept))
    else:
        # Rows of a class that is gone belong to the first.
        place = torch.zeros(case.classes, dtype=torch.int64)
        place[kept] = torch.arange(len(kept))
        is_class = case.target >= 0
        target = torch.where(is_class, place[case.target.where(is_class, 0)], case.target)
    yield replace(case, logits=case.logits[:, kept], target=target, weight=weight)


def _rounded(case: Case) -> Iterator[Case]:
    """The case with rounder logits, targets or weights."""
    logits = case.logits
    yield replace(case, logits=torch.zeros_like(logits))
    for digits in (0, 1):
        yield replace(case, logits=logits.round(decimals=digits))
    if logits.numel() <= FEW:
        for place, logit in enumerate(logits.flatten().tolist()):
            for value in _rounder_values(logit):
                changed = logits.clone()
                changed.view(-1)[place] = value
                yield replace(case, logits=changed)
    if case.soft:
        yield replace(case, target=torch.full_like(case.target, 1 / case.classes))
        for label in range(case.classes):
            yield one_hot(replace(case, target=torch.full((case.rows,), label)))
    elif case.rows <= FEW:
        for row in range(case.rows):
            yield replace(case, target=case.target.index_fill(0, torch.tensor(row), 0))
    weights = case.weight or ()
    for label, weight in enumerate(weights):
        for value in _rounder_values(weight):
            # A weight of 0 asks another question than one that is not.
            if (value == 0) == (weight == 0):
                yield replace(case, weight=(*weights[:label], abs(value), *weights[label + 1 :]))


def _rounder_values(value: float) -> Iterator[float]:
    """Numbers near `value`, or smaller, with fewer digits."""
    yield from (0.0, 1.0)
    if not math.isfinite(value):
        return
    if abs(value) >= 10:
        yield float(f"{value / 10:.0e}")
        yield float(f"{value / 2:.0e}")
    for digits in (1, 2, 3):
        yield float(f"{value:.{digits}g}")
