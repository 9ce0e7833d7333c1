"""Laws of precision: half-precision logits are promoted, and float32 is as good as it can be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.conformance.case import Case, rounding
from equiloss.conformance.derivatives import extreme_cases, extremes, gradient
from equiloss.conformance.law import Difference, law
from equiloss.conformance.rows import wrong_form
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss
from equiloss.parity import oracle


@law(gradient)
def promotion(subject: Subject) -> None:
    """bfloat16 and float16 logits give the float32 result of the promoted logits, autocast or not.

    A module's result is float32 also when its parameters are bfloat16.
    """

    def violates(case: Case) -> Difference | None:
        promoted = subject.losses(case.to(torch.float32))
        if case.logits.dtype == torch.float32:
            got = _under_autocast(subject, case)
            what = "losses under autocast"
        else:
            got, what = subject.losses(case), "losses"
        found = wrong_form(case, got)
        if found is None and not torch.equal(got, promoted):
            found = Difference(what, got, promoted)
        return found or _in_bfloat16(subject, case)

    case = subject.batch(5, 4)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    search(subject, [case.to(dtype) for dtype in dtypes], violates)


def _under_autocast(subject: Subject, case: Case) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return subject.losses(case)


def _in_bfloat16(subject: Subject, case: Case) -> Difference | None:
    """Whether a module that was taken to bfloat16, as `bf16-true` does, gives another dtype."""
    criterion = subject.make(case)
    if not list(criterion.parameters()):
        return None
    with errors_of_the_loss(), torch.no_grad():
        losses = criterion.bfloat16().per_sample(subject.given(case.logits), case.target)
    found = wrong_form(case, losses)
    return (
        None
        if found is None
        else Difference(f"{found.what} in bf16-true", found.got, found.expected)
    )


@law(extremes)
def accuracy(subject: Subject) -> None:
    """float32 errs no more than rounding explains, in loss and gradient.

    A loss that is cross-entropy may err by as much as torch's own plus the bound of
    `equiloss.parity.oracle`, against that oracle; any other by `rounding`, against itself in
    float64.
    """
    plain = [subject.batch(32, 10, scale=scale, dtype=torch.float32) for scale in (0.1, 1, 5, 20)]
    plain += [case for case in extreme_cases(subject) if case.logits.dtype == torch.float32]
    combined = [other for case in plain[:3] for other in subject.combined(case)]

    def violates(case: Case) -> Difference | None:
        return _inaccurate(subject, case)

    search(subject, [*plain, *combined], violates)


def _inaccurate(subject: Subject, case: Case) -> Difference | None:
    losses, gradient = subject.losses_and_gradient(case)
    exact_losses, exact_gradient = subject.losses_and_gradient(case.to(torch.float64))
    allowed = rounding(case, exact_losses, exact_gradient)
    definition = _oracle(subject, case)
    if _is(definition, exact_losses, exact_gradient):
        exact_losses, exact_gradient = definition.losses, definition.gradient
        allowed = definition.bound + _error_of_torch(subject, case, definition)
    error = torch.maximum(
        (losses.double() - exact_losses).abs(),
        (gradient.double() - exact_gradient).abs().amax(-1),
    )
    wrong = ~(error <= allowed)
    for row in wrong.nonzero().flatten().tolist():
        if not abs(losses[row].double() - exact_losses[row]) <= allowed[row]:
            expected = f"{exact_losses[row].item()!r} ± {allowed[row].item():.1e}"
            return Difference(f"loss of row {row}", losses[row], expected)
        expected = (
            f"{[round(g, 9) for g in exact_gradient[row].tolist()]} ± {allowed[row].item():.1e}"
        )
        return Difference(f"gradient of row {row}", gradient[row], expected)
    return None


def _oracle(subject: Subject, case: Case) -> oracle.Oracle:
    return oracle.cross_entropy(
        case.logits,
        case.target,
        weight=_weight(case),
        ignore_index=subject.ignored_in(case),
        label_smoothing=case.label_smoothing,
    )


def _weight(case: Case) -> Tensor | None:
    return None if case.weight is None else torch.tensor(case.weight, dtype=case.logits.dtype)


def _is(definition: oracle.Oracle, losses: Tensor, gradient: Tensor) -> bool:
    """Whether the loss is cross-entropy: in float64 it differs from it by rounding alone."""
    # The bound is float32's; half of its digits are enough to tell.
    close = 1e-4 * definition.bound
    return bool(
        ((losses - definition.losses).abs() <= close).all()
        and ((gradient - definition.gradient).abs().amax(-1) <= close).all()
    )


def _error_of_torch(subject: Subject, case: Case, definition: oracle.Oracle) -> Tensor:
    logits = case.logits.clone().requires_grad_()
    losses = F.cross_entropy(
        logits,
        case.target,
        weight=_weight(case),
        ignore_index=subject.ignored_in(case),
        label_smoothing=case.label_smoothing,
        reduction="none",
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return torch.maximum(
        (losses.detach().double() - definition.losses).abs(),
        (gradient.double() - definition.gradient).abs().amax(-1),
    )
