"""The law of losses that ask for the head's input instead of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from equiloss.conformance.case import Case, entries, rounding, tensor_code
from equiloss.conformance.derivatives import gradient
from equiloss.conformance.law import Broken, CounterExample, DoesNotApply, law
from equiloss.conformance.spelling import criterion_code
from equiloss.conformance.subject import Subject, errors_of_the_loss
from equiloss.losses.projection import Projection

# Rows, features and classes, the smallest first.
SIZES = ((1, 1, 2), (3, 2, 4))


@law(gradient)
def head(subject: Subject) -> None:
    """Features and head have the loss of the logits they make, and gradients by the chain rule."""
    if not subject.signature.wants_features:
        raise DoesNotApply("it takes logits")
    for rows, width, classes in SIZES:
        _check(subject, rows, width, subject.fixed_classes or classes)


def _check(subject: Subject, rows: int, width: int, classes: int) -> None:
    """Check features [rows, width] and a head [classes, width] against the loss of their logits."""
    leaves = {
        "features": _numbers(rows, width, 2),
        "head_weight": _numbers(classes, width, 4),
        "head_bias": _numbers(1, classes, 8)[0],
    }
    if not subject.signature.takes_head_bias:
        del leaves["head_bias"]
    head = Projection(leaves["features"], leaves["head_weight"], leaves.get("head_bias"))
    case = Case(head.logits().detach(), torch.arange(rows) % classes)
    # Of the loss with a head that is the identity, which other laws hold to be right.
    losses, slope = subject.evaluate(case)
    expected = {
        "losses": losses,
        "gradient of features": slope @ leaves["head_weight"],
        "gradient of head_weight": slope.T @ leaves["features"],
        "gradient of head_bias": slope.sum(0),
    }
    with errors_of_the_loss():
        result = subject.criterion(case).per_sample(head, case.target)
        gradients = torch.autograd.grad(
            result.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    got = {"losses": result.detach()}
    got |= {f"gradient of {key}": value for key, value in zip(leaves, gradients, strict=True)}
    # A sum over the rows, each within its bound, times features and weights of at most 1.
    bound = rounding(case, losses, slope).sum()
    for what, value in got.items():
        if not ((value - expected[what]).abs() <= bound).all():
            code = _code(subject, leaves, case.target)
            raise Broken(CounterExample(code, what, entries(value), entries(expected[what])))


def _numbers(rows: int, columns: int, parts: int) -> Tensor:
    """A matrix [rows, columns] of different round numbers in (-1, 1], which requires grad."""
    numbers = torch.arange(rows * columns, dtype=torch.float64) % (2 * parts) + 1 - parts
    return (numbers / parts).reshape(rows, columns).flip(0).requires_grad_()


def _code(subject: Subject, leaves: dict[str, Tensor], target: Tensor) -> str:
    """Write the call with features and head as lines of Python."""
    lines = [f"{key} = {tensor_code(value.detach())}" for key, value in leaves.items()]
    bias = "head_bias" if "head_bias" in leaves else "None"
    criterion = criterion_code(subject, len(leaves["head_weight"]), {})
    lines += [
        f"target = {tensor_code(target)}",
        f"head = Projection(features, head_weight, {bias})",
        f"losses = {criterion}.per_sample(head, target)",
    ]
    return "\n".join(lines)
