"""A law: what must hold of every loss, and how its breach is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equiloss.conformance.case import Case, rounding

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
    by_itself: bool = False
    """Of the loss, called without the criterion."""

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


Violates = Callable[[Case], Difference | None]
"""What is wrong with a call; None if nothing is."""


def apart(
    what: str, case: Case, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> Difference | None:
    """Whether two evaluations of a case's losses and gradient differ by more than rounding."""
    bound = rounding(case, *expected)
    if not ((got[0] - expected[0]).abs() <= bound).all():
        return Difference(f"losses {what}", got[0], expected[0])
    if not ((got[1] - expected[1]).abs().amax(-1) <= bound).all():
        return Difference(f"gradient {what}", got[1], expected[1])
    return None
