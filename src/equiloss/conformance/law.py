"""Laws of losses, and the counter-examples to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equiloss.conformance.case import Case, Evaluation, rounding
from equiloss.conformance.subject import Subject

# What a counter-example says where the loss gave no result.
RAISED = "error"


@dataclass(frozen=True, eq=False)
class Law:
    """A property that every loss must have, with the check of it."""

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
    """A result of a call, and the one that the law demands."""

    what: str
    """Which result: `loss of row 1`."""
    got: Tensor | float | str
    expected: Tensor | float | str
    without_criterion: bool = False
    """Whether the loss was called by itself, without the criterion."""

    @property
    def kind(self) -> str:
        """Kind of mistake, which shrinking keeps: a wrong number, one not finite, or an error."""
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
        """The lines of the call, and one for its result."""
        result = f"got {self.got}, expected {self.expected}" if self.expected else self.got
        return [*self.code.splitlines(), f"{self.what}: {result}"]


class Broken(Exception):  # noqa: N818 - it carries a finding, and always reaches a verdict
    """A law does not hold."""

    def __init__(self, example: CounterExample) -> None:
        super().__init__("\n".join(example.lines()))
        self.example = example

    @classmethod
    def by_error(cls, error: BaseException | str) -> Broken:
        """A law broken by an error outside of any call."""
        return cls(CounterExample("", RAISED, str(error), ""))


Finding = str | Broken | DoesNotApply | None
"""What the check of a law finds: a remark or None where the law holds."""

Violates = Callable[[Case], Difference | None]
"""The difference by which a call breaks a law; None if it does not."""


def unequal(what: str, got: Tensor, expected: Tensor) -> Difference | None:
    """The difference between two results that must be equal to the last bit."""
    return None if torch.equal(got, expected) else Difference(what, got, expected)


def beyond_rounding(
    what: str, case: Case, got: Evaluation, expected: Evaluation
) -> Difference | None:
    """The difference between two evaluations of a case, if it is more than rounding explains."""
    bound = rounding(case, *expected)
    if not ((got.losses - expected.losses).abs() <= bound).all():
        return Difference(f"losses {what}", got.losses, expected.losses)
    if not ((got.gradient - expected.gradient).abs().amax(-1) <= bound).all():
        return Difference(f"gradient {what}", got.gradient, expected.gradient)
    return None


def row_beyond(
    bound: Tensor, names: Sequence[str], got: Evaluation, expected: Evaluation
) -> Difference | None:
    """The difference in the first row whose loss or gradient is further off than its bound [N]."""
    for row, name in enumerate(names):
        for quantity, values, exact in zip(("loss", "gradient"), got, expected, strict=True):
            if not (values[row] - exact[row]).abs().max() <= bound[row]:
                return Difference(f"{quantity} of {name}", values[row], exact[row])
    return None
