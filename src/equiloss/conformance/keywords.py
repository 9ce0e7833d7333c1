"""The law of options: the signature is the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from equiloss.conformance.case import Case
from equiloss.conformance.law import Broken, CounterExample, Difference, law, unequal
from equiloss.conformance.rows import repeatable, wrong_shape_or_dtype
from equiloss.conformance.search import search
from equiloss.conformance.subject import LossRaised, Subject, errors_of_the_loss
from equiloss.losses.signature import RESERVED, Option

UNDECLARED = "no_such_option"


@law(repeatable)
def options(subject: Subject) -> str | None:
    """Declared options work, at their default and at each choice; undeclared ones are refused."""
    case = subject.batch(4, 4)
    declared = {
        key: option
        for key, option in subject.signature.options.items()
        if key not in RESERVED and option.default != "???"
    }
    for key, option in declared.items():
        if key not in subject.options:
            _check_default(subject, case, key, option.default)
        for choice in option.choices:
            _check_choice(subject, case, key, choice)
    _check_undeclared(subject, case)
    without_effect = [key for key in declared if not _has_effect(subject, case, key, declared[key])]
    if without_effect:
        return f"no other value of {', '.join(without_effect)} that was tried changed the loss"
    return None


def _check_default(subject: Subject, case: Case, key: str, default: Any) -> None:
    """Raise `Broken` if the loss with an option at its default is not the loss without it."""
    explicit = subject.with_options(**{key: default})

    def violates(case: Case) -> Difference | None:
        what = f"losses with the default, {default!r}"
        return unequal(what, explicit.losses(case), subject.losses(case))

    search(explicit, [case], violates)


def _check_choice(subject: Subject, case: Case, key: str, choice: str) -> None:
    """Raise `Broken` if the loss fails with one of an option's choices."""
    chosen = subject.with_options(**{key: choice})
    search(chosen, [case], lambda case: wrong_shape_or_dtype(case, chosen.losses(case)))


def _check_undeclared(subject: Subject, case: Case) -> None:
    """Raise `Broken` if the loss takes an option that its signature does not have.

    A wrapper with **options may hide behind the signature of what it wraps.
    """
    try:
        with errors_of_the_loss():
            if subject.is_module:
                subject.loss(**subject.options, **{UNDECLARED: 1})
            else:
                partial(subject.function(case), **{UNDECLARED: 1})(case.logits, case.target)
    except LossRaised:
        return
    raise Broken(CounterExample("", f"a call with {UNDECLARED}=1", "a result", "a TypeError"))


def _has_effect(subject: Subject, case: Case, key: str, option: Option) -> bool:
    """Whether another value changes a loss, or none can be tried."""
    expected = subject.losses(case)
    accepted = False
    for value in _other_values(option):
        with suppress(LossRaised):  # a value that the loss refuses
            losses = subject.with_options(**{key: value}).losses(case)
            accepted = True
            if not torch.equal(losses, expected):
                return True
    return not accepted


def _other_values(option: Option) -> Iterator[Any]:
    """Values of the default's type, or choices, that may have an effect."""
    default = option.default
    if option.choices:
        yield from (choice for choice in option.choices if choice != default)
    elif isinstance(default, bool):
        yield not default
    elif isinstance(default, int):
        yield from (default + 1, default - 1, 2 * default, 0, 1)
    elif isinstance(default, float):
        yield from (2 * default, default / 2, default + 0.25, default - 0.25, 0.0, 1.0)
    elif default is None:
        yield from (0.5, 1, 2, True)
