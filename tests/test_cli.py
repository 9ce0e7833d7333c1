"""The `equiloss` command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from equiloss.cli import app
from equiloss.errors import LossError
from equiloss.invariance import proof
from equiloss.invariance.cells import Cell, Part
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


class TestVerifyInvariance:
    def test_it_writes_the_table_and_exits_0(self, tmp_path: Path) -> None:
        output = call("verify", "invariance", "--part", "evaluation", "--output", str(tmp_path))
        assert "evaluation: 84 figures, all within their bounds" in output
        report = json.loads((tmp_path / "invariance.json").read_text())
        assert report["holds"] is True
        assert report["parts"].keys() == {"evaluation"}
        assert len(report["parts"]["evaluation"]["cells"]) == 84
        page = (tmp_path / "invariance.md").read_text()
        assert "| N=359, confusion matrix | 0 | 0 | 0 | 0 |" in page

    def test_a_figure_beyond_its_bound_is_shown_and_exits_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cells = [Cell("loss", "W=2", 1e-3, 1e-12), Cell("loss", "W=3", 0.0, 1e-12)]
        part = {"evaluation": Part("Evaluation", "What was done.", cells)}
        monkeypatch.setitem(proof.PARTS, "evaluation", lambda _: part)
        arguments = ["verify", "invariance", "--part", "evaluation", "--output", str(tmp_path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "1 BEYOND THEIR BOUND" in result.output
        page = (tmp_path / "invariance.md").read_text()
        assert "Verdict: **BROKEN**" in page
        assert "| loss | **1.0e-03** | 0 |" in page
        assert json.loads((tmp_path / "invariance.json").read_text())["holds"] is False

    def test_an_unknown_part_gets_one_line(self, tmp_path: Path) -> None:
        arguments = ["verify", "invariance", "--part", "gradient", "--output", str(tmp_path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert result.output.startswith("error: unknown part 'gradient'. Did you mean 'gradients'?")
        assert list(tmp_path.iterdir()) == []


class TestCells:
    @pytest.mark.parametrize(
        ("cell", "holds"),
        [
            (Cell("", "", 0.0, 0.0), True),
            (Cell("", "", 2e-12, 1e-12), False),
            (Cell("", "", float("nan"), 1e-12), False),
            # The control must be found out where it has to differ.
            (Cell("", "", 0.0, 0.0, control=0.5, control_differs=True), True),
            (Cell("", "", 0.0, 0.0, control=float("nan"), control_differs=True), True),
            (Cell("", "", 0.0, 0.0, control=1e-9, control_differs=True), False),
            (Cell("", "", 0.0, 0.0, control=1e-9), True),
        ],
    )
    def test_when_a_cell_holds(self, cell: Cell, holds: bool) -> None:
        assert cell.holds is holds

    def test_a_part_without_cells_proves_nothing(self) -> None:
        assert not Part("", "").holds
