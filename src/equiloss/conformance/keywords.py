"""The law of options: the signature is the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from equiloss.conformance.case import Case
from equiloss.conformance.law import Broken, CounterExample, Difference, law
from equiloss.conformance.rows import repeatable, wrong_form
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
            _default_differs(subject, case, key, option)
        for choice in option.choices:
            _choice_fails(subject, case, key, choice)
    _undeclared_is_taken(subject, case)
    without_effect = [
        key for key, option in declared.items() if not _has_effect(subject, case, key, option)
    ]
    if without_effect:
        return f"no other value of {', '.join(without_effect)} that was tried changed the loss"
    return None


def _default_differs(subject: Subject, case: Case, key: str, option: Option) -> None:
    given = subject.with_options(**{key: option.default})

    def violates(case: Case) -> Difference | None:
        got, expected = given.losses(case), subject.losses(case)
        if torch.equal(got, expected):
            return None
        return Difference(f"losses with the default, {option.default!r}", got, expected)

    search(given, [case], violates)


def _choice_fails(subject: Subject, case: Case, key: str, choice: str) -> None:
    chosen = subject.with_options(**{key: choice})
    search(chosen, [case], lambda case: wrong_form(case, chosen.losses(case)))


def _undeclared_is_taken(subject: Subject, case: Case) -> None:
    """A wrapper with **options may hide behind the signature of what it wraps."""
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
    ran = False
    for value in _other_values(option):
        try:
            got = subject.with_options(**{key: value}).losses(case)
        except LossRaised:
            continue  # a value that the loss refuses
        ran = True
        if not torch.equal(got, expected):
            return True
    return not ran


def _other_values(option: Option) -> Iterator[Any]:
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
