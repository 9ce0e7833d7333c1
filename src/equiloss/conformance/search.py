"""The search for the smallest counter-example to a law."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from equiloss.conformance import spelling
from equiloss.conformance.case import Case, entries
from equiloss.conformance.law import RAISED, Broken, CounterExample, Difference, Violates
from equiloss.conformance.shrink import shrink
from equiloss.conformance.subject import LossRaised, Subject


def search(
    subject: Subject, cases: Iterable[Case], violates: Violates, *, tries: int = 300
) -> None:
    """Raise `Broken` with the smallest case that violates a law, if any of `cases` does.

    Args:
        subject: The loss; calls outside its domain are not made.
        cases: Calls to begin with.
        violates: The difference by which a call breaks the law. An error of the loss is one too,
            wherever it occurs.
        tries: Calls spent on finding a smaller one.
    """

    def violation(case: Case) -> Difference | None:
        if subject.is_outside(case):
            return None
        try:
            return violates(case)
        except LossRaised as error:
            return Difference(RAISED, str(error), "")

    for case in cases:
        difference = violation(case)
        if difference is None:
            continue

        def same_kind(smaller: Case, kind: str = difference.kind) -> Difference | None:
            other = violation(smaller)
            return other if other is not None and other.kind == kind else None

        smallest = shrink(case, difference, same_kind, tries, subject.fixed_classes)
        raise Broken(counter_example(subject, *smallest))


def counter_example(subject: Subject, case: Case, difference: Difference) -> CounterExample:
    """Write a call that breaks a law, and its results, as text."""
    code = spelling.bare_call if difference.without_criterion else spelling.criterion_call
    return CounterExample(
        code(subject, case, with_gradient=difference.what.startswith("gradient")),
        difference.what,
        _text(difference.got),
        _text(difference.expected),
    )


def _text(value: Tensor | float | str) -> str:
    if isinstance(value, Tensor):
        return entries(value)
    return value if isinstance(value, str) else repr(value)
