"""Laws of a batch: its shape, and that each row has a loss of its own."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from equiloss.conformance.case import Case, rounding
from equiloss.conformance.law import Difference, law, row_beyond, unequal
from equiloss.conformance.search import search
from equiloss.conformance.subject import LossRaised, Subject, errors_of_the_loss


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
    cases = [subject.batch(3, 4), subject.batch(3, 4, dtype=torch.float32)]
    search(subject, cases, lambda case: wrong_shape_or_dtype(case, subject.losses(case)))


@law(shape)
def finite(subject: Subject) -> None:
    """Ordinary logits have a finite loss."""
    cases = [subject.batch(4, 4, scale=0), *(subject.batch(8, 4, seed=seed) for seed in range(4))]
    cases += [case.to(torch.float32) for case in cases]
    search(subject, cases, lambda case: not_finite(subject.losses(case)))


@law(finite)
def sizes(subject: Subject) -> None:
    """No rows, one row, two classes and a thousand classes make a batch like any other."""

    def violates(case: Case) -> Difference | None:
        losses = subject.losses(case)
        return wrong_shape_or_dtype(case, losses) or not_finite(losses)

    sizes = [(0, 2), (1, 2), (1, 4), (2, 1000)]
    search(subject, [subject.batch(rows, classes) for rows, classes in sizes], violates)


@law(shape)
def pure(subject: Subject) -> None:
    """The tensors that it is given are left as they are."""

    def violates(case: Case) -> Difference | None:
        loss = subject.criterion(case).loss
        leading, keywords = subject.leading_arguments(case), subject.keywords(case)
        arguments = leading | keywords
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        given = arguments | {key: tensor.clone() for key, tensor in tensors.items()}
        with torch.no_grad(), errors_of_the_loss():
            loss(*(given[key] for key in leading), **{key: given[key] for key in keywords})
        for key, before in tensors.items():
            if not torch.equal(given[key], before):
                what = f"{key} after the call"
                return Difference(what, given[key], before, without_criterion=True)
        return None

    cases = [subject.batch(4, 4)]
    if subject.supports("ignore_index"):
        cases.append(subject.with_ignored_rows(cases[0]))
    search(subject, cases, violates)


@law(finite, pure)
def repeatable(subject: Subject) -> None:
    """A second call gives the same bits."""

    def violates(case: Case) -> Difference | None:
        first, second = subject.losses(case), subject.losses(case)
        return unequal("losses of a second call", second, first)

    search(subject, [subject.batch(4, 4), subject.batch(64, 10, dtype=torch.float32)], violates)


@law(shape)
def attached(subject: Subject) -> None:
    """The gradient reaches the logits."""

    def violates(case: Case) -> Difference | None:
        try:
            gradient = subject.evaluate(case).gradient
        except LossRaised as error:
            return Difference("gradient", str(error), "one that reaches the logits")
        expected = "one that is not 0 everywhere"
        return None if gradient.any() else Difference("gradient", gradient, expected)

    search(subject, [subject.batch(4, 4)], violates)


@law(repeatable, sizes)
def unreduced(subject: Subject) -> None:
    """Nothing is summed or averaged over rows."""

    def violates(case: Case) -> Difference | None:
        together = subject.losses(case)
        alone = torch.cat([subject.losses(case.select([row])) for row in range(case.rows)])
        bound = rounding(case, alone, torch.ones_like(case.logits))
        if ((together - alone).abs() <= bound).all():
            return None
        reduced = {
            "the mean of all rows": alone.mean(),
            "the sum of all rows": alone.sum(),
            f"divided by the {case.rows} rows": alone / case.rows,
            f"multiplied by the {case.rows} rows": alone * case.rows,
        }
        for reduction, values in reduced.items():
            if ((together - values).abs() <= bound).all():
                return Difference(f"losses, {reduction}", together, alone)
        return None

    search(subject, [subject.batch(3, 4), subject.batch(2, 4, seed=1)], violates)


@law(unreduced, attached)
def independence(subject: Subject) -> None:
    """A row's loss and gradient depend neither on the other rows nor on their order."""
    cases = [subject.batch(6, 4), subject.batch(9, 3, seed=1)]
    search(subject, cases, partial(depends_on_other_rows, subject))


def depends_on_other_rows(subject: Subject, case: Case) -> Difference | None:
    """The first row that has another loss or gradient alone, in reverse order or half a batch."""
    batch = subject.evaluate(case)
    rows = list(range(case.rows))
    half = len(rows) // 2
    for subset in (*([row] for row in rows), rows[::-1], rows[:half], rows[half:]):
        part = case.select(subset)
        got, expected = subject.evaluate(part), batch.select(subset)
        company = "alone" if len(subset) == 1 else f"among the rows {subset}"
        names = [f"row {row} {company}" for row in subset]
        difference = row_beyond(rounding(part, *got), names, got, expected)
        if difference is not None:
            return difference
    return None


def wrong_shape_or_dtype(case: Case, losses: Tensor) -> Difference | None:
    """The shape of a result that is not [N]; else its dtype, if it is not the promoted one."""
    if losses.shape != case.logits.shape[:1]:
        return Difference("shape", str(list(losses.shape)), str([case.rows]))
    promoted = torch.promote_types(case.logits.dtype, torch.float32)
    if losses.dtype != promoted:
        return Difference("dtype", str(losses.dtype), str(promoted))
    return None


def not_finite(losses: Tensor) -> Difference | None:
    """The first loss that is not finite."""
    for row, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            return Difference(f"loss of row {row}", loss, "a finite number")
    return None
