"""What Hydra, torch and a user's own values say, in one short printable line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from equiloss.errors import UserError
from equiloss.imports import import_target
from equiloss.launching.composition_errors import check_words, explain, mendable
from support import composed, wrong_with


def test_the_line_of_long_and_wild_values_keeps_its_ends() -> None:
    line = explain(UserError("data.root=\x1b[31m\n" + "x" * 10_000 + ": name another"))
    assert line.startswith("data.root=\\x1b[31m\\nxxx")
    assert line.endswith("xxx: name another")
    assert wrong_with(line) is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parity=null", r"a group takes the name of a file of conf/, as in parity=off"),
        ("trainer=${presentation_keys:}", "^Hydra cannot compose this command line: "),
        ("data.augment.mixup=1" + "0" * 400, r"^data\.augment\.mixup: int too large"),
        ("data.augment=~", r"""^data\.augment=~: .* of its own: 'data\.augment="~"'$"""),
    ],
)
def test_what_hydra_makes_a_traceback_of_is_one_line(override: str, words: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:  # of any type
        composed(override)
    assert mendable(caught.value)
    line = explain(caught.value)
    assert re.search(words, line)
    assert wrong_with(line) is None


def test_a_number_that_python_does_not_read_is_named() -> None:
    with pytest.raises(UserError, match=r"^seed=9+… has a number of more than 4300 digits"):
        check_words(["task=fit", "seed=" + "9" * 4301])
    check_words(["seed=" + "9" * 4299])


def test_refused_memory_is_mendable_and_other_errors_of_torch_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert mendable(caught.value)
    assert explain(caught.value).startswith("out of memory: ")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2) + torch.empty(3)
    assert not mendable(caught.value)


def test_the_users_own_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_own.py").write_text("import json\n\ndef read():\n    json.loads('{')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Expecting property name") as raised:
        import_target("their_own:read", "x", UserError)()
    # Below the line that called it, a library; above it, ours.
    assert explain(raised.value).endswith(f"char 1) in {tmp_path}/their_own.py, line 4")
    with pytest.raises(AttributeError) as raised:
        explain(3)
    assert " in /" not in explain(raised.value)
