"""Laws of targets and class weights: the meaning of the reserved keywords."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from equiloss.conformance.case import Case, Evaluation, class_weights, one_hot
from equiloss.conformance.derivatives import (
    extreme_cases,
    extremes,
    gradient,
    not_finite_anywhere,
    not_the_derivative,
)
from equiloss.conformance.law import Difference, DoesNotApply, beyond_rounding, law, row_beyond
from equiloss.conformance.rows import depends_on_other_rows
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss, evaluate_function

# So little label smoothing is none, in a function that is continuous.
NEGLIGIBLE = 1e-17


@law(gradient)
def soft_targets(subject: Subject) -> None:
    """Classes and the same classes as one-hot probabilities have the same loss and gradient."""
    if not subject.signature.soft_targets:
        raise DoesNotApply("it does not take probabilities (soft_targets)")

    def violates(case: Case) -> Difference | None:
        expected, got = subject.evaluate(case), subject.evaluate(one_hot(case))
        return beyond_rounding("of one-hot targets", case, got, expected)

    search(subject, [subject.batch(5, 4)], violates)


@law(gradient)
def label_smoothing(subject: Subject) -> None:
    """ε = 0 changes nothing; ε > 0 is the target (1 - ε) one-hot + ε / C, where that is taken."""
    if not subject.supports("label_smoothing"):
        raise DoesNotApply("it has no label_smoothing")

    def violates(case: Case) -> Difference | None:
        comparisons = [(NEGLIGIBLE, "ε = 0", case)]  # ε, and what must have the same loss
        if subject.signature.soft_targets:
            for smoothing in (0.25, 1.0):
                mixture = one_hot(case).target * (1 - smoothing) + smoothing / case.classes
                comparisons.append((smoothing, "the mixture", replace(case, target=mixture)))
        for smoothing, name, equivalent in comparisons:
            expected = subject.evaluate(equivalent)
            smoothed = subject.evaluate(replace(case, label_smoothing=smoothing))
            what = f"with ε = {smoothing}, against {name}"
            difference = beyond_rounding(what, case, smoothed, expected)
            if difference is not None:
                return difference
        return None

    search(subject, [subject.batch(5, 4)], violates)


@law(gradient)
def weight(subject: Subject) -> None:
    """The weight of its class scales each row: loss and gradient are w_y times the unweighted."""
    if not subject.supports("weight"):
        raise DoesNotApply("it has no weight")

    def violates(case: Case) -> Difference | None:
        class_weight = case.logits.new_tensor(case.weight or (1.0,) * case.classes)  # [C]
        weight = class_weight[case.target]  # [N]
        losses, gradient = subject.evaluate(replace(case, weight=None))
        expected = Evaluation(weight * losses, weight.unsqueeze(-1) * gradient)
        return beyond_rounding("with weights", case, subject.evaluate(case), expected)

    case = subject.batch(5, 4)
    classes = case.classes
    weights = [(1.0,) * classes, (2.0,) * classes, class_weights(classes)]
    search(subject, [replace(case, weight=weight) for weight in weights], violates)


@law(gradient)
def ignored_rows(subject: Subject) -> None:
    """Rows whose target is ignore_index are exactly 0 in loss and gradient, and change no other."""
    if not subject.supports("ignore_index"):
        raise DoesNotApply("it has no ignore_index")

    def violates(case: Case) -> Difference | None:
        ignored = case.target == subject.ignore_index(case)  # [N]
        # The criterion takes the logits of ignored rows away, whatever they are.
        with_nan = replace(case, logits=case.logits.masked_fill(ignored.unsqueeze(-1), torch.nan))
        difference = _not_zero(ignored, subject.evaluate(with_nan))
        difference = difference or _kept_rows_differ(subject, case, ~ignored)
        if difference is not None:
            return difference
        # Also without the criterion, with ordinary logits in the ignored rows.
        loss = subject.function(case)
        with errors_of_the_loss():
            difference = _not_zero(ignored, evaluate_function(loss, case))
        return difference and replace(difference, without_criterion=True)

    plain = [replace(subject.batch(6, 4), ignore_index=index) for index in (None, -1, 1)]
    cases = [subject.with_ignored_rows(case) for case in plain]
    cases.append(replace(cases[0], target=torch.full((6,), subject.ignore_index(cases[0]))))
    for case in cases[:3]:
        if subject.supports("label_smoothing"):
            cases.append(replace(case, label_smoothing=0.25))
        if subject.supports("weight"):
            cases.append(replace(case, weight=class_weights(case.classes)))
    search(subject, cases, violates)


def _not_zero(ignored: Tensor, evaluation: Evaluation) -> Difference | None:
    """The first ignored row [N, bool] whose loss or gradient is not exactly 0."""
    rows = ignored.nonzero().flatten().tolist()
    got = evaluation.select(rows)
    names = [f"the ignored row {row}" for row in rows]
    return row_beyond(torch.zeros(len(rows)), names, got, Evaluation(*map(torch.zeros_like, got)))


def _kept_rows_differ(subject: Subject, case: Case, kept: Tensor) -> Difference | None:
    """The difference that ignored rows make in the loss or gradient of kept ones [N, bool]."""
    rows = kept.nonzero().flatten().tolist()
    if not rows:
        return None
    alone = case.select(rows)
    got, expected = subject.evaluate(case).select(rows), subject.evaluate(alone)
    return beyond_rounding(f"of the rows {rows} beside ignored ones", alone, got, expected)


@law(extremes, soft_targets, label_smoothing, weight, ignored_rows)
def combinations(subject: Subject) -> None:
    """With all that it supports at once, rows are independent, gradients right, values finite."""
    cases = list(subject.combined(subject.batch(6, 4)))
    if len(cases) == 1 and not cases[0].options() and not subject.supports("ignore_index"):
        raise DoesNotApply("it takes classes alone")
    search(subject, cases, partial(depends_on_other_rows, subject))
    few = subject.combined(subject.batch(3, 3))
    search(subject, few, partial(not_the_derivative, subject), tries=100)
    extreme = [combined for case in extreme_cases(subject) for combined in subject.combined(case)]
    search(subject, extreme, partial(not_finite_anywhere, subject))
