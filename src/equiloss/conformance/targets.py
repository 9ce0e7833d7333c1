"""Laws of targets and class weights: what the reserved keywords must mean."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equiloss.conformance.case import Case, class_weights, one_hot
from equiloss.conformance.derivatives import (
    extreme_cases,
    extremes,
    gradient,
    not_finite_anywhere,
    not_the_derivative,
)
from equiloss.conformance.law import Difference, DoesNotApply, apart, law
from equiloss.conformance.rows import depends_on_others
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss, with_ignored_rows

# So little label smoothing is none, in a function that is continuous.
HARDLY_ANY = 1e-17


@law(gradient)
def soft_targets(subject: Subject) -> None:
    """Classes and the same classes as one-hot probabilities have the same loss and gradient."""
    if not subject.signature.soft_targets:
        raise DoesNotApply("it does not take probabilities (soft_targets)")

    def violates(case: Case) -> Difference | None:
        classes = subject.losses_and_gradient(case)
        return apart(
            "of one-hot targets", case, subject.losses_and_gradient(one_hot(case)), classes
        )

    search(subject, [subject.batch(5, 4)], violates)


@law(gradient)
def label_smoothing(subject: Subject) -> None:
    """ε = 0 changes nothing; ε > 0 is the target (1 - ε) one-hot + ε / C, where that is taken."""
    if not subject.supports("label_smoothing"):
        raise DoesNotApply("it has no label_smoothing")

    def violates(case: Case) -> Difference | None:
        plain = subject.losses_and_gradient(case)
        almost = subject.losses_and_gradient(replace(case, label_smoothing=HARDLY_ANY))
        found = apart(f"with ε = {HARDLY_ANY}, against ε = 0", case, almost, plain)
        if found is not None or not subject.signature.soft_targets:
            return found
        for smoothing in (0.25, 1.0):
            spread = one_hot(case).target * (1 - smoothing) + smoothing / case.classes
            mixed = subject.losses_and_gradient(replace(case, target=spread))
            smoothed = subject.losses_and_gradient(replace(case, label_smoothing=smoothing))
            found = apart(f"with ε = {smoothing}, against the mixture", case, smoothed, mixed)
            if found is not None:
                return found
        return None

    search(subject, [subject.batch(5, 4)], violates)


@law(gradient)
def weight(subject: Subject) -> None:
    """The weight of its class scales each row: loss and gradient are w_y times the unweighted."""
    if not subject.supports("weight"):
        raise DoesNotApply("it has no weight")

    def violates(case: Case) -> Difference | None:
        weight = torch.tensor(case.weight or (1.0,) * case.classes, dtype=case.logits.dtype)
        weight = weight[case.target]  # [N]
        losses, gradient = subject.losses_and_gradient(replace(case, weight=None))
        expected = weight * losses, weight.unsqueeze(-1) * gradient
        return apart("with weights", case, subject.losses_and_gradient(case), expected)

    case = subject.batch(5, 4)
    classes = case.classes
    every = [(1.0,) * classes, (2.0,) * classes, class_weights(classes)]
    search(subject, [replace(case, weight=weights) for weights in every], violates)


@law(gradient)
def ignored_rows(subject: Subject) -> None:
    """Rows whose target is ignore_index are exactly 0 in loss and gradient, and change no other."""
    if not subject.supports("ignore_index"):
        raise DoesNotApply("it has no ignore_index")

    def violates(case: Case) -> Difference | None:
        out = case.target == subject.ignored_in(case)
        # The criterion takes the logits of ignored rows away, whatever they are.
        wild = replace(case, logits=case.logits.masked_fill(out.unsqueeze(-1), torch.nan))
        return (
            _not_zero(out, *subject.losses_and_gradient(wild))
            or _kept_rows_differ(subject, case, ~out)
            or _not_zero(out, *_by_itself(subject, case), by_itself=True)
        )

    plain = subject.batch(6, 4)
    marked = [replace(plain, ignore_index=index) for index in (None, -1, 1)]
    cases = [with_ignored_rows(case, subject.ignored_in(case)) for case in marked]
    cases.append(replace(cases[0], target=torch.full((6,), subject.ignored)))
    for case in cases[:3]:
        if subject.supports("label_smoothing"):
            cases.append(replace(case, label_smoothing=0.25))
        if subject.supports("weight"):
            cases.append(replace(case, weight=class_weights(case.classes)))
    search(subject, cases, violates)


def _by_itself(subject: Subject, case: Case) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the function, with ordinary logits also in ignored rows."""
    logits = case.logits.clone().requires_grad_()
    with errors_of_the_loss():
        losses = subject.function(case)(logits, case.target.clone())
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), gradient


def _not_zero(
    ignored: Tensor, losses: Tensor, gradient: Tensor, *, by_itself: bool = False
) -> Difference | None:
    for row in ignored.nonzero().flatten().tolist():
        if losses[row] != 0:
            return Difference(f"loss of the ignored row {row}", losses[row], 0.0, by_itself)
        if gradient[row].ne(0).any():
            zero = torch.zeros_like(gradient[row])
            what = f"gradient of the ignored row {row}"
            return Difference(what, gradient[row], zero, by_itself)
    return None


def _kept_rows_differ(subject: Subject, case: Case, kept: Tensor) -> Difference | None:
    rows = kept.nonzero().flatten().tolist()
    if not rows:
        return None
    alone = case.at(rows)
    losses, gradient = subject.losses_and_gradient(case)
    kept_rows = losses[rows], gradient[rows]
    expected = subject.losses_and_gradient(alone)
    return apart(f"of the rows {rows} beside ignored ones", alone, kept_rows, expected)


@law(extremes, soft_targets, label_smoothing, weight, ignored_rows)
def combinations(subject: Subject) -> None:
    """With all that it supports at once, rows are independent, gradients right, values finite."""
    cases = list(subject.combined(subject.batch(6, 4)))
    if len(cases) == 1 and not cases[0].options() and not subject.supports("ignore_index"):
        raise DoesNotApply("it takes classes alone")
    search(subject, cases, depends_on_others(subject))
    search(subject, subject.combined(subject.batch(3, 3)), not_the_derivative(subject), tries=100)
    extreme = [combined for case in extreme_cases(subject) for combined in subject.combined(case)]
    search(subject, extreme, not_finite_anywhere(subject))
