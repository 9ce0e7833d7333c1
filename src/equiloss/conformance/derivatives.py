"""Laws of derivatives, of extreme logits, and of a constant added to all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from equiloss.conformance.case import Case
from equiloss.conformance.law import Difference, DoesNotApply, beyond_rounding, law, unequal
from equiloss.conformance.rows import attached, independence, not_finite
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss

# Step of the central differences; gradcheck's own.
STEP = 1e-6

# Gaps between logits. Softmax underflows in float32 from 88 on, its square long before, and
# training with too large a step passes 1e4.
GAPS = (20.0, 50.0, 89.0, 104.0, 200.0, 1e3, 1e4)

SHIFTS = (1.0, -7.0, 1000.0)


@law(attached, independence)
def gradient(subject: Subject) -> None:
    """The gradient is the derivative of the loss (float64, against central differences)."""
    cases = [subject.batch(3, 4), subject.batch(3, 3, seed=1, scale=6)]
    search(subject, cases, partial(not_the_derivative, subject), tries=100)


def not_the_derivative(subject: Subject, case: Case) -> Difference | None:
    """The gradient in the logits and the central differences, if torch's gradcheck refuses it."""
    losses = subject.per_sample(case)
    if _passes_gradcheck(lambda logits: losses(logits, case.target), case.logits):
        return None
    gradient = subject.evaluate(case).gradient
    return Difference("gradient", gradient, _central_differences(subject, case))


def _passes_gradcheck(function: Callable[[Tensor], Tensor], value: Tensor, **options: bool) -> bool:
    """Whether torch's gradcheck accepts the gradient of a function at a value."""
    with errors_of_the_loss():
        # Its tolerances (1e-5 + 1e-3 relative) are what differences over a step of 1e-6 err by
        # at most, for third derivatives up to 1e7.
        leaf = value.detach().clone().requires_grad_()
        return gradcheck(function, leaf, eps=STEP, raise_exception=False, **options)


def _central_differences(subject: Subject, case: Case) -> Tensor:
    """Central differences [N, C]: rows are independent, so that one step serves all of them."""

    def losses(step: Tensor) -> Tensor:
        return subject.losses(replace(case, logits=case.logits + step))

    steps = STEP * torch.eye(case.classes, dtype=case.logits.dtype)  # [C, C], one in each logit
    columns = [(losses(step) - losses(-step)) / (2 * STEP) for step in steps]
    # No more digits than they have.
    return torch.stack(columns, dim=-1).round(decimals=6)  # [N, C]


@law(gradient)
def parameters(subject: Subject) -> None:
    """Each of its parameters gets its derivative, and its state_dict holds all that it learned."""
    case = subject.batch(4, 4)
    criterion = subject.criterion(case)
    if not [*criterion.parameters(), *criterion.buffers()]:
        raise DoesNotApply("it has no parameters")

    def violates(case: Case) -> Difference | None:
        return _wrong_parameter_gradient(subject, case) or _unsaved_state(subject, case)

    search(subject, [case], violates, tries=100)


def _wrong_parameter_gradient(subject: Subject, case: Case) -> Difference | None:
    """The gradient of the first parameter whose gradient is missing, or refused by gradcheck."""
    criterion = subject.criterion(case)
    learned = {key: value for key, value in criterion.named_parameters() if value.requires_grad}
    with errors_of_the_loss():
        logits = case.logits.clone().requires_grad_()  # as a network's are
        total = criterion(subject.outputs(logits), case.target).total
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            total, list(learned.values()), allow_unused=True
        )
    arguments = subject.outputs(case.logits), case.target
    for key, gradient in zip(learned, gradients, strict=True):
        name = f"parameter {key.removeprefix('loss.')}, its gradient"
        if gradient is None:
            return Difference(name, "none", "its derivative")

        def total_of(value: Tensor, key: str = key) -> Tensor:
            total: Tensor = functional_call(criterion, {key: value}, arguments).total
            return total

        # fast_mode: in a random direction, however many numbers the parameter has.
        if not _passes_gradcheck(total_of, learned[key], fast_mode=True):
            return Difference(name, gradient, "its derivative, by central differences")
    return None


def _unsaved_state(subject: Subject, case: Case) -> Difference | None:
    """The losses of a learned module and of another that loaded its state_dict, if they differ."""
    first, second = subject.new_criterion(case), subject.new_criterion(case, seed=1)
    with errors_of_the_loss(), torch.no_grad():
        for value in first.parameters():
            value.add_(0.125)  # as if it had learned
        arguments = subject.outputs(case.logits), case.target
        expected = first.per_sample(*arguments)
        second.load_state_dict(first.state_dict())
        got = second.per_sample(*arguments)
    return unequal("losses after load_state_dict(state_dict)", got, expected)


@law(gradient)
def extremes(subject: Subject) -> None:
    """Loss and gradient are finite at extreme logits, or up to max_logit_range."""
    search(subject, extreme_cases(subject), partial(not_finite_anywhere, subject))


def extreme_cases(subject: Subject) -> list[Case]:
    """Cases with one logit far from the others, all far from 0, or in a ramp, for each target."""
    cases = []
    for dtype in (torch.float32, torch.float64):
        classes = subject.batch(1, 3).classes
        domain = subject.signature.domain(dtype)
        # logsumexp(x) - min(x) is at most gap + log(C); keep a percent off the edge.
        largest = 0.99 * (domain - math.log(classes))
        for gap in (gap for gap in (0.0, *GAPS, largest) if gap <= largest and math.isfinite(gap)):
            # The first logit is apart from the others; the last row is a ramp.
            rows = torch.zeros(4, classes, dtype=dtype)
            rows[0, 0], rows[1, 0] = gap, -gap
            rows[2] = gap
            rows[3] = torch.linspace(0, gap, classes)
            logits = rows.repeat_interleave(classes, dim=0)  # [4 C, C]
            cases.append(Case(logits, torch.arange(classes).repeat(4)))
    return cases


def not_finite_anywhere(subject: Subject, case: Case) -> Difference | None:
    """The first loss that is not finite; if there is none, the first such gradient of a row."""
    losses, gradient = subject.evaluate(case)
    wrong_gradients = (
        Difference(f"gradient of row {row}", row_gradient, "finite numbers")
        for row, row_gradient in enumerate(gradient)
        if not row_gradient.isfinite().all()
    )
    return not_finite(losses) or next(wrong_gradients, None)


@law(independence)
def shift(subject: Subject) -> None:
    """A constant added to all logits of a row changes nothing, unless shift_invariant denies it."""
    if not subject.signature.is_shift_invariant(subject.options):
        raise DoesNotApply("shift_invariant says that it does not hold")

    def violates(case: Case) -> Difference | None:
        expected = subject.evaluate(case)
        for constant in SHIFTS:
            shifted = replace(case, logits=case.logits + constant)
            what = f"of logits + {constant:g}"
            difference = beyond_rounding(what, shifted, subject.evaluate(shifted), expected)
            if difference is not None:
                return difference
        return None

    search(subject, [subject.batch(4, 4)], violates)
