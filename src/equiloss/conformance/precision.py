"""Laws of precision: half-precision logits are promoted, and float32 is as good as it can be."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from equiloss.conformance.case import Case, Evaluation, rounding
from equiloss.conformance.derivatives import extreme_cases, extremes, gradient
from equiloss.conformance.law import Difference, law, unequal
from equiloss.conformance.rows import wrong_shape_or_dtype
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss, evaluate_function
from equiloss.parity import oracle


@law(gradient)
def promotion(subject: Subject) -> None:
    """bfloat16 and float16 logits give the float32 result of the promoted logits, autocast or not.

    A module's result is float32 also when its parameters are bfloat16.
    """

    def violates(case: Case) -> Difference | None:
        promoted = subject.losses(case.to(torch.float32))
        autocast = case.logits.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = subject.losses(case)
        return (
            wrong_shape_or_dtype(case, losses)
            or unequal("losses under autocast" if autocast else "losses", losses, promoted)
            or _not_promoted_in_bfloat16(subject, case)
        )

    case = subject.batch(5, 4)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    search(subject, [case.to(dtype) for dtype in dtypes], violates)


def _not_promoted_in_bfloat16(subject: Subject, case: Case) -> Difference | None:
    """The wrong dtype of the losses of a module cast to bfloat16, as `bf16-true` does."""
    criterion = subject.new_criterion(case)
    if not list(criterion.parameters()):
        return None
    with errors_of_the_loss(), torch.no_grad():
        losses = criterion.bfloat16().per_sample(subject.outputs(case.logits), case.target)
    difference = wrong_shape_or_dtype(case, losses)
    return difference and replace(difference, what=f"{difference.what} in bf16-true")


@law(extremes)
def accuracy(subject: Subject) -> None:
    """float32 errs no more than rounding explains, in loss and gradient.

    A loss that is cross-entropy may err by as much as torch's own plus the bound of
    `equiloss.parity.oracle`, against that oracle; any other by `rounding`, against itself in
    float64.
    """
    plain = [subject.batch(32, 10, scale=scale, dtype=torch.float32) for scale in (0.1, 1, 5, 20)]
    plain += [case for case in extreme_cases(subject) if case.logits.dtype == torch.float32]
    combined = [variant for case in plain[:3] for variant in subject.combined(case)]
    search(subject, [*plain, *combined], partial(_inaccurate, subject))


def _inaccurate(subject: Subject, case: Case) -> Difference | None:
    """The first row whose float32 loss or gradient errs by more than is allowed."""
    evaluation = subject.evaluate(case)
    exact = subject.evaluate(case.to(torch.float64))
    bound = rounding(case, *exact)
    keywords: dict[str, Any] = {
        "weight": None if case.weight is None else case.logits.new_tensor(case.weight),
        "label_smoothing": case.label_smoothing,
    }
    if not case.soft:  # no row of probabilities is ignored, and torch refuses a class for them
        keywords["ignore_index"] = subject.ignore_index(case)
    definition = oracle.cross_entropy(case.logits, case.target, **keywords)
    cross_entropy = Evaluation(definition.losses, definition.gradient)
    # In float64 a loss that is cross-entropy differs from it by rounding alone. The oracle's bound
    # is float32's; half of its digits are enough to tell.
    if (exact.errors(cross_entropy) <= 1e-4 * definition.bound).all():
        exact = cross_entropy
        torch_loss = partial(F.cross_entropy, reduction="none", **keywords)
        bound = definition.bound + evaluate_function(torch_loss, case).errors(exact)
    wrong_rows = (~(evaluation.errors(exact) <= bound)).nonzero().flatten().tolist()
    if not wrong_rows:
        return None
    row = wrong_rows[0]
    tolerance = f"± {bound[row].item():.1e}"
    loss, exact_loss = evaluation.losses[row], exact.losses[row]
    if not abs(loss - exact_loss) <= bound[row]:
        return Difference(f"loss of row {row}", loss, f"{exact_loss.item()!r} {tolerance}")
    expected = f"{[round(g, 9) for g in exact.gradient[row].tolist()]} {tolerance}"
    return Difference(f"gradient of row {row}", evaluation.gradient[row], expected)
