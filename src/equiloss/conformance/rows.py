"""Laws of a batch: its shape, and that each row has a loss of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equiloss.conformance.case import Case, rounding
from equiloss.conformance.law import Difference, Violates, law
from equiloss.conformance.search import search
from equiloss.conformance.subject import LossRaised, Subject, errors_of_the_loss, with_ignored_rows


@law()
def loads(subject: Subject) -> None:
    """It can be imported, its signature is that of a loss, and its options have values."""

    def violates(case: Case) -> None:
        subject.criterion(case)
        with errors_of_the_loss():
            subject.signature.domain(case.logits.dtype)
            subject.signature.is_shift_invariant(subject.options)

    search(subject, [subject.batch(1, 2)], violates, tries=0)


@law(loads)
def shape(subject: Subject) -> None:
    """Logits [N, C] and targets [N] give one loss for each row, [N], in the logits' dtype."""

    def violates(case: Case) -> Difference | None:
        return wrong_form(case, subject.losses(case))

    search(subject, [subject.batch(3, 4), subject.batch(3, 4, dtype=torch.float32)], violates)


@law(shape)
def finite(subject: Subject) -> None:
    """Ordinary logits have a finite loss."""

    def violates(case: Case) -> Difference | None:
        return not_finite(subject.losses(case))

    cases = [subject.batch(4, 4, scale=0), *(subject.batch(8, 4, seed=seed) for seed in range(4))]
    search(subject, [*cases, *(case.to(torch.float32) for case in cases)], violates)


@law(finite)
def sizes(subject: Subject) -> None:
    """No rows, one row, two classes and a thousand classes make a batch like any other."""

    def violates(case: Case) -> Difference | None:
        losses = subject.losses(case)
        return wrong_form(case, losses) or not_finite(losses)

    sizes = [(0, 2), (1, 2), (1, 4), (2, 1000)]
    search(subject, [subject.batch(rows, classes) for rows, classes in sizes], violates)


@law(shape)
def pure(subject: Subject) -> None:
    """The tensors that it is given are left as they are."""

    def violates(case: Case) -> Difference | None:
        loss, keywords = subject.criterion(case).loss, subject.keywords(case)
        given = subject.leading(case) | {
            key: value for key, value in keywords.items() if isinstance(value, Tensor)
        }
        handed = {key: value.clone() for key, value in given.items()}
        with torch.no_grad(), errors_of_the_loss():
            loss(**(keywords | handed))
        for key, before in given.items():
            if not torch.equal(handed[key], before):
                return Difference(f"{key} after the call", handed[key], before, by_itself=True)
        return None

    case = subject.batch(4, 4)
    cases = [case]
    if subject.supports("ignore_index"):
        cases.append(with_ignored_rows(case, subject.ignored))
    search(subject, cases, violates)


@law(finite, pure)
def repeatable(subject: Subject) -> None:
    """A second call gives the same bits."""

    def violates(case: Case) -> Difference | None:
        first, second = subject.losses(case), subject.losses(case)
        if torch.equal(first, second):
            return None
        return Difference("losses of a second call", second, first)

    search(subject, [subject.batch(4, 4), subject.batch(64, 10, dtype=torch.float32)], violates)


@law(shape)
def attached(subject: Subject) -> None:
    """The gradient reaches the logits."""

    def violates(case: Case) -> Difference | None:
        try:
            _, gradient = subject.losses_and_gradient(case)
        except LossRaised as error:
            return Difference("gradient", str(error), "one that reaches the logits")
        if gradient.any():
            return None
        return Difference("gradient", gradient, "one that is not 0 everywhere")

    search(subject, [subject.batch(4, 4)], violates)


@law(repeatable, sizes)
def unreduced(subject: Subject) -> None:
    """Nothing is summed or averaged over rows."""

    def violates(case: Case) -> Difference | None:
        together = subject.losses(case)
        alone = torch.cat([subject.losses(case.at([row])) for row in range(case.rows)])
        close = rounding(case, alone, torch.ones_like(case.logits))
        if ((together - alone).abs() <= close).all():
            return None
        reduced = {
            "the mean of all rows": alone.mean(),
            "the sum of all rows": alone.sum(),
            f"divided by the {case.rows} rows": alone / case.rows,
            f"multiplied by the {case.rows} rows": alone * case.rows,
        }
        for reduction, values in reduced.items():
            if ((together - values).abs() <= close).all():
                return Difference(f"losses, {reduction}", together, alone)
        return None

    search(subject, [subject.batch(3, 4), subject.batch(2, 4, seed=1)], violates)


@law(unreduced, attached)
def independence(subject: Subject) -> None:
    """A row's loss and gradient depend neither on the other rows nor on their order."""
    cases = [subject.batch(6, 4), subject.batch(9, 3, seed=1)]
    search(subject, cases, depends_on_others(subject))


def depends_on_others(subject: Subject) -> Violates:
    """Whether a row's loss or gradient is another one alone, in another order, in half a batch."""

    def violates(case: Case) -> Difference | None:
        losses, gradient = subject.losses_and_gradient(case)
        rows = list(range(case.rows))
        half = len(rows) // 2
        for chosen in (*([row] for row in rows), rows[::-1], rows[:half], rows[half:]):
            smaller = case.at(chosen)
            own, own_gradient = subject.losses_and_gradient(smaller)
            bound = rounding(smaller, own, own_gradient)
            company = "alone" if len(chosen) == 1 else f"among the rows {chosen}"
            for place, row in enumerate(chosen):
                if not abs(own[place] - losses[row]) <= bound[place]:
                    return Difference(f"loss of row {row} {company}", own[place], losses[row])
                if not (own_gradient[place] - gradient[row]).abs().amax() <= bound[place]:
                    return Difference(
                        f"gradient of row {row} {company}", own_gradient[place], gradient[row]
                    )
        return None

    return violates


def wrong_form(case: Case, losses: Tensor) -> Difference | None:
    """What is wrong with the shape of a result, or with its dtype."""
    if losses.shape != case.logits.shape[:1]:
        return Difference("shape", str(list(losses.shape)), str([case.rows]))
    promoted = torch.promote_types(case.logits.dtype, torch.float32)
    if losses.dtype != promoted:
        return Difference("dtype", str(losses.dtype), str(promoted))
    return None


def not_finite(losses: Tensor) -> Difference | None:
    """The first row whose loss is not finite."""
    for row, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            return Difference(f"loss of row {row}", loss, "a finite number")
    return None
