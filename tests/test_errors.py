"""Messages: the culprit, the near miss and the choices, as long as they can be read."""

from __future__ import annotations

import inspect

import pytest

from equiloss import errors
from equiloss.errors import LISTED, ConfigError, UserError, choose, unknown


def test_a_choice_is_returned():
    assert choose("task", "fit", ("fit", "test")) == "fit"
    assert choose("task", "fit", iter(["fit", "test"])) == "fit"


def test_what_is_no_choice_is_refused_with_the_near_miss():
    with pytest.raises(
        ConfigError, match=r"^unknown task 'tset'\. Did you mean 'test'\? Known: fit"
    ):
        choose("task", "tset", ("fit", "test"))
    with pytest.raises(ConfigError, match=r"^unknown task 'FIT'\. Did you mean 'fit'"):
        choose("task", "FIT", ("fit", "test"))


def test_without_a_near_miss_there_is_no_guess():
    assert unknown("task", "xyz", ["fit", "test"]) == "unknown task 'xyz'. Known: fit, test"


def test_case_does_not_hide_a_near_miss():
    assert "Did you mean 'AdamW'?" in unknown("optimizer", "adamw", ["SGD", "AdamW"])


def test_names_that_differ_in_case_alone_are_all_listed():
    assert unknown("model", "xyz", ["Net", "net"]) == "unknown model 'xyz'. Known: Net, net"


def test_a_long_list_is_cut_to_what_is_near():
    names = [f"resnet{n}" for n in range(LISTED + 1)]
    message = unknown("model", "resnet99", names)
    assert "; 26 are known" in message
    assert len(message) < 150
    # With nothing near, or few names, the whole list is the help.
    assert "resnet25" in unknown("model", "xyz", names)
    assert "resnet24" in unknown("model", "resnet99", names[:LISTED])


def test_every_error_of_the_user_is_a_value_error_that_is_explained():
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    ]
    assert len(kinds) > 4
    for kind in kinds:
        assert issubclass(kind, UserError)
        assert issubclass(kind, ValueError)
        assert kind.__doc__
