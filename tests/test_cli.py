"""The `equiloss` command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from equiloss.cli import app
from equiloss.errors import LossError
from equiloss.losses import registry

FORMULATIONS = {"softmax_nll", "log_softmax_nll", "cross_entropy"}


def call(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def listed() -> dict[str, dict[str, Any]]:
    return {row.pop("name"): row for row in json.loads(call("losses", "--json"))}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A plugin whose import fails."""

    def load() -> Any:
        raise LossError("loss 'broken' of bad-losses 1.0 cannot be imported: no CUDA here")

    provider = registry.Provider("broken", "bad-losses 1.0", load)
    monkeypatch.setitem(registry._registered, "broken", provider)
    return "broken"


def test_losses_lists_every_registered_name():
    assert set(listed()) == set(registry.names()) >= FORMULATIONS
    output = call("losses")
    assert all(name in output for name in FORMULATIONS)


def test_losses_tells_source_options_and_capabilities():
    row = listed()["softmax_nll"]
    assert row["source"] == "equiloss"
    assert row["options"] == {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    assert row["supports"] == ["ignore_index", "label_smoothing", "weight"]
    assert row["soft_targets"] is True
    assert row["shift_invariant"] is True
    domain = registry.signature("softmax_nll").domain
    assert row["max_logit_range"] == {
        "float32": domain(torch.float32),
        "float64": domain(torch.float64),
    }
    assert listed()["cross_entropy"]["max_logit_range"] is None


def test_a_broken_plugin_is_named_and_breaks_no_other(broken):
    rows = listed()
    assert rows[broken] == {
        "source": "bad-losses 1.0",
        "error": "loss 'broken' of bad-losses 1.0 cannot be imported: no CUDA here",
    }
    assert not any("error" in rows[name] for name in FORMULATIONS)
    output = call("losses")
    assert "bad-losses 1.0" in output
    assert "softmax_nll" in output


@pytest.mark.parametrize("default", [torch.tensor([1.0]), torch.float32, {1, 2}], ids=str)
def test_a_default_that_json_does_not_know_breaks_nothing(monkeypatch, default):
    def odd(logits, target, *, value=default): ...

    provider = registry.Provider("odd", "odd-losses 1.0", lambda: odd)
    monkeypatch.setitem(registry._registered, "odd", provider)
    assert str(default) in str(listed()["odd"])


def test_without_a_command_it_explains_itself():
    result = CliRunner().invoke(app, [])
    assert "losses" in result.output


def test_an_unknown_command_is_refused():
    assert CliRunner().invoke(app, ["lossess"]).exit_code == 2
