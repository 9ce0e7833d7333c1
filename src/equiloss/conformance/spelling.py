"""Calls of a loss as lines of Python, to be copied and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from equiloss.conformance.case import Case, tensor_code
from equiloss.conformance.subject import Subject, class_counts


def criterion(subject: Subject, classes: int, options: Mapping[str, Any]) -> str:
    """The loss as a criterion.

    Args:
        subject: The loss, with its own options.
        classes: C; training rows of each are given to a loss that takes them.
        options: Further ones.
    """
    options = {**subject.options, **options}
    if subject.supports("class_counts"):
        options["class_counts"] = class_counts(classes)
    name = repr(subject.name) if subject.registered else subject.name
    return _called("Criterion", name, **options)


def through_criterion(subject: Subject, case: Case, *, with_gradient: bool = False) -> str:
    """A call as a run makes it."""
    loss = criterion(subject, case.classes, case.options())
    given = "logits"
    if subject.signature.wants_features:
        bias = f"torch.zeros({case.classes})" if subject.signature.takes_head_bias else "None"
        given = f"Projection(logits, {_head(case)}, {bias})"
    return _lines(case, f"{loss}.per_sample({given}, target)", with_gradient)


def by_itself(subject: Subject, case: Case, *, with_gradient: bool = False) -> str:
    """A call without the criterion."""
    loss = f"get({subject.name!r})" if subject.registered else subject.name
    if subject.is_module:
        loss = _called(loss, **subject.options)
    given = ["logits", _head(case)] if subject.signature.wants_features else ["logits"]
    return _lines(case, _called(loss, *given, "target", **subject.keywords(case)), with_gradient)


def _head(case: Case) -> str:
    """The head with which features are the logits."""
    return f"torch.eye({case.classes}).to(logits)"


def _lines(case: Case, call: str, with_gradient: bool) -> str:
    lines = [
        f"logits = {tensor_code(case.logits)}{'.requires_grad_()' if with_gradient else ''}",
        f"target = {tensor_code(case.target)}",
        f"losses = {call}",
    ]
    if with_gradient:
        lines.append("(gradient,) = torch.autograd.grad(losses.sum(), logits)")
    return "\n".join(lines)


def _called(function: str, *arguments: str, **keywords: Any) -> str:
    named = [
        f"{key}={tensor_code(value) if isinstance(value, Tensor) else repr(value)}"
        for key, value in keywords.items()
    ]
    return f"{function}({', '.join([*arguments, *named])})"
