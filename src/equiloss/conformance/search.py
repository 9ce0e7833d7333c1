"""The search for a counter-example: whether a call breaks a law, and how small one can be."""

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
        violates: What is wrong with a call. An error of the loss is, wherever it occurs.
        tries: Calls spent on finding a smaller one.
    """

    def found(case: Case) -> Difference | None:
        if subject.is_outside(case):
            return None
        try:
            return violates(case)
        except LossRaised as error:
            return Difference(RAISED, str(error), "")

    for case in cases:
        difference = found(case)
        if difference is None:
            continue

        def still(smaller: Case, kind: str = difference.kind) -> Difference | None:
            again = found(smaller)
            return again if again is not None and again.kind == kind else None

        smallest, finding = shrink(case, difference, still, tries, subject.fixed_classes)
        raise Broken(counter_example(subject, smallest, finding))


def counter_example(subject: Subject, case: Case, difference: Difference) -> CounterExample:
    """A wrong call, as text."""
    spell = spelling.by_itself if difference.by_itself else spelling.through_criterion
    return CounterExample(
        spell(subject, case, with_gradient=difference.what.startswith("gradient")),
        difference.what,
        _text(difference.got),
        _text(difference.expected),
    )


def _text(value: Tensor | float | str) -> str:
    if isinstance(value, Tensor):
        return entries(value)
    return value if isinstance(value, str) else repr(value)
