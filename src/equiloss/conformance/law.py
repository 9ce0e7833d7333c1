"""A law: what must hold of every loss, and how its breach is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equiloss.conformance.case import Case, entries
from equiloss.conformance.shrink import shrink

if TYPE_CHECKING:
    from equiloss.conformance.subject import Subject


# What a counter-example says where the loss gave no result.
RAISED = "error"


@dataclass(frozen=True, eq=False)
class Law:
    """What must hold of every loss."""

    name: str
    sentence: str
    check: Callable[[Subject], str | None]
    """Returns nothing, or a remark; raises `Broken` or `DoesNotApply`."""
    needs: tuple[Law, ...] = ()
    """Laws without which the check would find their breach, not its own."""


def law(*needs: Law) -> Callable[[Callable[[Subject], str | None]], Law]:
    """Make a law of its check: named as the function is, and stated by its docstring's head."""

    def make(check: Callable[[Subject], str | None]) -> Law:
        sentence = (check.__doc__ or "").partition("\n\n")[0]
        return Law(check.__name__.replace("_", " "), sentence, check, needs)

    return make


class DoesNotApply(Exception):  # noqa: N818 - no error: the law is about something else
    """The loss has nothing that the law is about; the message says what."""


@dataclass(frozen=True)
class Difference:
    """What one call gave, and what the law says."""

    what: str
    """Which result: `loss of row 1`."""
    got: Tensor | float | str
    expected: Tensor | float | str

    @property
    def kind(self) -> str:
        """A wrong number, something that is no number, or an error: they are never one mistake."""
        if isinstance(self.got, str):
            return self.what
        return "number" if torch.as_tensor(self.got).isfinite().all() else "no number"


@dataclass(frozen=True)
class CounterExample:
    """The smallest call found that breaks a law."""

    code: str
    """The call, ready to be run; empty where there is none."""
    what: str
    got: str
    expected: str
    """Empty where what was got is an error."""

    def lines(self) -> list[str]:
        """The call, and what it gave."""
        found = f"got {self.got}, expected {self.expected}" if self.expected else self.got
        return [*self.code.splitlines(), f"{self.what}: {found}"]

    @classmethod
    def of_error(cls, error: BaseException | str) -> CounterExample:
        """An error outside of any call."""
        return cls("", RAISED, str(error), "")


class Broken(Exception):  # noqa: N818 - it carries a finding, and always reaches a verdict
    """A law does not hold."""

    def __init__(self, example: CounterExample) -> None:
        super().__init__("\n".join(example.lines()))
        self.example = example


class LossRaised(Exception):  # noqa: N818 - the error is the loss's own, its cause
    """The loss raised an exception where it should have given a result."""

    def __init__(self, error: BaseException) -> None:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else ''}")


@contextmanager
def errors_of_the_loss() -> Iterator[None]:
    """Turn what the loss raises into `LossRaised`."""
    try:
        yield
    except Exception as error:
        raise LossRaised(error) from error


Violates = Callable[[Case], Difference | None]


def search(
    subject: Subject, cases: Iterable[Case], violates: Violates, *, tries: int = 300
) -> None:
    """Raise `Broken` with the smallest case that violates a law, if any of `cases` does.

    Args:
        subject: The loss; calls outside its domain are not made.
        cases: Calls to begin with.
        violates: What is wrong with a call; None if nothing is. An error of the loss is wrong.
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
    return CounterExample(
        subject.code(case),
        difference.what,
        _text(difference.got),
        _text(difference.expected),
    )


def _text(value: Tensor | float | str) -> str:
    if isinstance(value, Tensor):
        return entries(value)
    return value if isinstance(value, str) else repr(value)
