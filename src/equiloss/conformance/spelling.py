"""Calls of a loss as lines of Python, to be copied and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from equiloss.conformance.case import Case, tensor_code
from equiloss.conformance.subject import Subject, class_counts


def criterion_code(subject: Subject, classes: int, options: Mapping[str, Any]) -> str:
    """Write the criterion of a loss.

    Args:
        subject: The loss, with its own options.
        classes: C; training rows of each are given to a loss that takes them.
        options: Further options of the criterion.
    """
    options = {**subject.options, **options}
    if subject.supports("class_counts"):
        options["class_counts"] = class_counts(classes)
    name = repr(subject.name) if subject.registered else subject.name
    return _call("Criterion", name, **options)


def criterion_call(subject: Subject, case: Case, *, with_gradient: bool) -> str:
    """Write a call of a loss through its criterion, as a run makes it."""
    criterion = criterion_code(subject, case.classes, case.options())
    outputs = "logits"
    if subject.signature.wants_features:
        bias = f"torch.zeros({case.classes})" if subject.signature.takes_head_bias else "None"
        outputs = f"Projection(logits, {_identity(case)}, {bias})"
    return _lines(case, f"{criterion}.per_sample({outputs}, target)", with_gradient)


def bare_call(subject: Subject, case: Case, *, with_gradient: bool) -> str:
    """Write a call of a loss without the criterion."""
    loss = f"get({subject.name!r})" if subject.registered else subject.name
    if subject.is_module:
        loss = _call(loss, **subject.options)
    rows = ["logits", _identity(case)] if subject.signature.wants_features else ["logits"]
    return _lines(case, _call(loss, *rows, "target", **subject.keywords(case)), with_gradient)


def _identity(case: Case) -> str:
    """The weight of a head with which features are the logits."""
    return f"torch.eye({case.classes}).to(logits)"


def _lines(case: Case, call: str, with_gradient: bool) -> str:
    """Write a case's tensors, the call, and the gradient if it is wanted."""
    lines = [
        f"logits = {tensor_code(case.logits)}{'.requires_grad_()' if with_gradient else ''}",
        f"target = {tensor_code(case.target)}",
        f"losses = {call}",
    ]
    if with_gradient:
        lines.append("(gradient,) = torch.autograd.grad(losses.sum(), logits)")
    return "\n".join(lines)


def _call(function: str, *arguments: str, **keywords: Any) -> str:
    named = [
        f"{key}={tensor_code(value) if isinstance(value, Tensor) else repr(value)}"
        for key, value in keywords.items()
    ]
    return f"{function}({', '.join([*arguments, *named])})"
