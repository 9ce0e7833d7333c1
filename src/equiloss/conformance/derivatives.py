"""Laws of the gradient, and of what the loss does far out and under a shift."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from equiloss.conformance.case import Case
from equiloss.conformance.law import Difference, DoesNotApply, Violates, apart, law
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
    search(subject, cases, not_the_derivative(subject), tries=100)


def not_the_derivative(subject: Subject) -> Violates:
    """Whether torch's gradcheck refuses the gradient of the losses in the logits."""

    def violates(case: Case) -> Difference | None:
        criterion = subject.criterion(case)

        def losses(logits: Tensor) -> Tensor:
            return criterion.per_sample(subject.given(logits), case.target)

        with errors_of_the_loss():
            # Its tolerances (1e-5 + 1e-3 relative) are what differences over a step of 1e-6 err by
            # at most, for third derivatives up to 1e7.
            right = torch.autograd.gradcheck(
                losses, case.logits.clone().requires_grad_(), eps=STEP, raise_exception=False
            )
        if right:
            return None
        _, gradient = subject.losses_and_gradient(case)
        return Difference("gradient", gradient, _differences(subject, case))

    return violates


def _differences(subject: Subject, case: Case) -> Tensor:
    """Central differences [N, C]: rows are independent, so that one step serves all of them."""
    columns = []
    for label in range(case.classes):
        step = torch.zeros_like(case.logits)
        step[:, label] = STEP
        above = subject.losses(replace(case, logits=case.logits + step))
        below = subject.losses(replace(case, logits=case.logits - step))
        columns.append((above - below) / (2 * STEP))
    # No more digits than they have.
    return torch.stack(columns, dim=-1).round(decimals=6)  # [N, C]


@law(gradient)
def parameters(subject: Subject) -> None:
    """Each of its parameters gets its derivative, and its state_dict holds all that it learned."""
    case = subject.batch(4, 4)
    criterion = subject.criterion(case)
    if not list(criterion.parameters()) and not list(criterion.buffers()):
        raise DoesNotApply("it has no parameters")

    def violates(case: Case) -> Difference | None:
        return _wrong_parameter(subject, case) or _state_left_behind(subject, case)

    search(subject, [case], violates, tries=100)


def _wrong_parameter(subject: Subject, case: Case) -> Difference | None:
    criterion = subject.criterion(case)
    learned = {key: value for key, value in criterion.named_parameters() if value.requires_grad}
    with errors_of_the_loss():
        logits = case.logits.clone().requires_grad_()  # as a network's are
        total = criterion(subject.given(logits), case.target).total
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            total, list(learned.values()), allow_unused=True
        )
    for key, gradient in zip(learned, gradients, strict=True):
        name = f"parameter {key.removeprefix('loss.')}, its gradient"
        if gradient is None:
            return Difference(name, "none", "its derivative")

        def total_of(value: Tensor, key: str = key) -> Tensor:
            given = subject.given(case.logits), case.target
            summed = functional_call(criterion, {key: value}, given)
            total: Tensor = summed.total
            return total

        value = learned[key].detach().clone().requires_grad_()
        with errors_of_the_loss():
            # fast_mode: in a random direction, however many numbers the parameter has.
            right = torch.autograd.gradcheck(
                total_of, value, eps=STEP, fast_mode=True, raise_exception=False
            )
        if not right:
            return Difference(name, gradient, "its derivative, by central differences")
    return None


def _state_left_behind(subject: Subject, case: Case) -> Difference | None:
    """Whether another module with the first one's state_dict gives another loss."""
    first, second = subject.make(case), subject.make(case, seed=1)
    with errors_of_the_loss(), torch.no_grad():
        for value in first.parameters():
            value.add_(0.125)  # as if it had learned
        given = subject.given(case.logits), case.target
        expected = first.per_sample(*given)
        second.load_state_dict(first.state_dict())
        got = second.per_sample(*given)
    if torch.equal(got, expected):
        return None
    return Difference("losses after load_state_dict(state_dict)", got, expected)


@law(gradient)
def extremes(subject: Subject) -> None:
    """Loss and gradient are finite at extreme logits, or up to max_logit_range."""
    search(subject, extreme_cases(subject), not_finite_anywhere(subject))


def extreme_cases(subject: Subject) -> list[Case]:
    """One logit far above or below the others, all far from 0, and each class the target."""
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


def not_finite_anywhere(subject: Subject) -> Violates:
    """Whether a loss or a gradient is not finite."""

    def violates(case: Case) -> Difference | None:
        losses, gradient = subject.losses_and_gradient(case)
        found = not_finite(losses)
        if found is not None:
            return found
        for row in range(case.rows):
            if not gradient[row].isfinite().all():
                return Difference(f"gradient of row {row}", gradient[row], "finite numbers")
        return None

    return violates


@law(independence)
def shift(subject: Subject) -> None:
    """A constant added to all logits of a row changes nothing, unless shift_invariant denies it."""
    if not subject.signature.is_shift_invariant(subject.options):
        raise DoesNotApply("shift_invariant says that it does not hold")

    def violates(case: Case) -> Difference | None:
        expected = subject.losses_and_gradient(case)
        for constant in SHIFTS:
            moved = replace(case, logits=case.logits + constant)
            got = subject.losses_and_gradient(moved)
            found = apart(f"of logits + {constant:g}", moved, got, expected)
            if found is not None:
                return found
        return None

    search(subject, [subject.batch(4, 4)], violates)
