"""The `equiloss` command."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from equiloss.cli import braille, catalogue
from equiloss.cli.main import app
from equiloss.errors import LossError
from equiloss.invariance import proof
from equiloss.invariance.cells import Cell, Part
from equiloss.losses import register, registry
from support import Run

FORMULATIONS = {"softmax_nll", "log_softmax_nll", "cross_entropy"}


def call(*arguments: str, columns: int = 200) -> str:
    runner = CliRunner(env={"COLUMNS": str(columns)})
    result = runner.invoke(app, list(arguments), catch_exceptions=False)
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


def test_version() -> None:
    assert call("--version").startswith(f"equiloss {version('equiloss')}, torch {version('torch')}")


def test_the_choices_of_an_option_are_shown(monkeypatch: pytest.MonkeyPatch, run_here: Run) -> None:
    def powered(
        logits: Any, target: Any, *, power: Literal[1, 2] = 1, kind: Literal["a"] | None = None
    ) -> Any:
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return losses**power

    register(powered)
    try:
        shown = call("losses", "powered")
        assert "1 | 2" in shown
        assert "a | null" in shown
        assert run_here("loss=powered", "loss.power=2", "debug=fast").status == "completed"
        with pytest.raises(LossError, match=r"value of loss\.power '3'. Known: 1, 2"):
            run_here("loss=powered", "loss.power=3", "debug=fast")
        with pytest.raises(LossError, match=r"value of loss\.kind 'b'"):
            run_here("loss=powered", "loss.kind=b", "debug=fast")
    finally:
        registry.unregister("powered")


def test_losses_lists_every_registered_name():
    assert set(listed()) == set(registry.names()) >= FORMULATIONS
    output = call("losses")
    assert all(name in output for name in FORMULATIONS)


def test_losses_tells_source_options_and_capabilities():
    row = listed()["softmax_nll"]
    assert row["source"] == f"equiloss {version('equiloss')}"
    assert row["options"] == {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    assert "IMA J. Numer. Anal." in row["reference"]
    assert row["supports"] == ["ignore_index", "label_smoothing", "weight"]
    assert row["soft_targets"] is True
    assert row["shift_invariant"] is True
    domain = registry.signature("softmax_nll").domain
    assert row["max_logit_range"] == {
        "float32": domain(torch.float32),
        "float64": domain(torch.float64),
    }
    assert listed()["cross_entropy"]["max_logit_range"] is None
    assert listed()["sigmoid_bce"]["shift_invariant"] is False


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_loses_nothing_in_any_terminal(columns):
    cells = [""] * 3  # all that stands in each column, without the line breaks
    for line in call("losses", columns=columns).splitlines():
        assert len(line) <= columns
        assert "…" not in line
        if line.startswith("│"):
            parts = line.strip("│").split("│")
            cells = [f"{cell}{part.strip()}" for cell, part in zip(cells, parts, strict=True)]
    for name, row in listed().items():
        for text in (name, row["source"], row["reference"]):
            assert text.replace(" ", "") in cells[0].replace(" ", "")
        for key, value in row["options"].items():
            assert f"{key}={'null' if value is None else value}" in cells[1]


def test_a_broken_plugin_is_named_and_breaks_no_other(broken):
    rows = listed()
    assert rows[broken] == {
        "source": "bad-losses 1.0",
        "error": "loss 'broken' of bad-losses 1.0 cannot be imported: no CUDA here",
    }
    assert not any("error" in rows[name] for name in FORMULATIONS)
    output = call("losses")
    assert "bad-losses 1.0" in output
    assert "no CUDA here" in output
    assert "softmax_nll" in output


@pytest.mark.parametrize(
    "attributes",
    [{"max_logit_range": "wide"}, {"shift_invariant": lambda options: options["gamma"] > 0}],
    ids=["max_logit_range", "shift_invariant"],
)
def test_a_plugin_may_be_broken_in_any_way(monkeypatch, attributes):
    def odd(logits, target): ...

    vars(odd).update(attributes)
    provider = registry.Provider("odd", "odd-losses 1.0", lambda: odd)
    monkeypatch.setitem(registry._registered, "odd", provider)
    assert listed()["odd"]["error"].startswith(("ValueError", "KeyError"))
    call("losses")


@pytest.mark.parametrize(
    "default", [torch.tensor([1.0]), torch.float32, {1, 2}], ids=["tensor", "dtype", "set"]
)
def test_a_default_that_json_does_not_know_breaks_nothing(monkeypatch, default):
    def odd(logits, target, *, value=default): ...

    provider = registry.Provider("odd", "odd-losses 1.0", lambda: odd)
    monkeypatch.setitem(registry._registered, "odd", provider)
    assert str(default) in str(listed()["odd"])


class TestPage:
    def test_it_shows_formula_options_reference_and_a_plot(self):
        output = call("losses", "focal", columns=80)
        assert "loss = -w_y (1 - p_y)^γ log p_y" in output
        assert "every finite logit, also for γ < 1" in " ".join(output.split())
        assert re.search(r"loss\.gamma +│ float +│ 2\.0", output)
        assert "ICCV 2017" in output
        plot = [line for line in output.splitlines() if "┤" in line]
        assert len(plot) == 8
        assert all(line.count("┤") == 2 and len(line) <= 80 for line in plot)
        # From the upper left, a wrong row's large loss, to the lower right.
        loss = [line.partition("┤")[2].partition("  ")[0] for line in plot]
        assert loss[0].strip("⠀").startswith("⢱")
        assert loss[0][1:].strip("⠀") == "" != loss[-1][-1].strip("⠀")

    def test_as_json(self):
        page = json.loads(call("losses", "cross_entropy", "--json"))
        assert page.items() >= listed()["cross_entropy"].items()
        assert page["formula"].startswith("loss = sum_c w_c t'_c")
        assert page["doc"].startswith("`torch.nn.functional.cross_entropy` without its reduction")
        curve = page["curve"]
        for p, loss, gradient in zip(*(curve[k] for k in ("p", "loss", "gradient")), strict=True):
            assert loss == pytest.approx(-math.log(p), rel=1e-14)
            assert gradient == pytest.approx(p - 1, rel=1e-14)

    @pytest.mark.parametrize("name", registry.names())
    def test_every_loss_has_one(self, name):
        page = json.loads(call("losses", name, "--json"))
        assert page["formula"]
        assert page["reference"]
        if not registry.signature(name).wants_features:
            assert page["curve"]["loss"][0] > page["curve"]["loss"][-1]

    def test_a_loss_that_needs_an_option_has_no_plot_and_says_why(self, monkeypatch):
        def sharp(logits, target, *, gamma: float): ...

        provider = registry.Provider("sharp", "odd-losses 1.0", lambda: sharp)
        monkeypatch.setitem(registry._registered, "sharp", provider)
        output = call("losses", "sharp")
        assert "no plot: LossError: loss 'sharp' requires loss.gamma" in output
        assert re.search(r"loss\.gamma +│ float +│ \(required\)", output)
        assert json.loads(call("losses", "sharp", "--json"))["curve"] is None

    def test_what_is_not_finite_is_left_out(self, monkeypatch):
        def steep(logits, target):
            return torch.where(logits[:, 0] > 0, logits[:, 0], torch.inf)

        provider = registry.Provider("steep", "odd-losses 1.0", lambda: steep)
        monkeypatch.setitem(registry._registered, "steep", provider)
        assert None in json.loads(call("losses", "steep", "--json"))["curve"]["loss"]
        plot = [line for line in call("losses", "steep").splitlines() if "┤" in line]
        assert plot[0].partition("┤")[2].startswith("⠀")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("foca", "error: unknown loss 'foca'. Did you mean 'focal'?"),
            ("broken", "error: loss 'broken' of bad-losses 1.0 cannot be imported: no CUDA here"),
        ],
    )
    def test_a_loss_that_cannot_be_shown_gets_one_line(self, name, message, broken):
        for arguments in (["losses", name], ["losses", name, "--json"]):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 1
            assert result.stderr.startswith(message)
            assert result.stdout == ""


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0, 2.0], [math.nan] * 4, []], ids=str)
def test_a_curve_without_a_span_is_drawn(values):
    assert len(braille.curve("flat", values, height=3)) == 4


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "broken pipe")

    monkeypatch.setattr(catalogue, "read_entry", gone)
    result = CliRunner().invoke(app, ["losses", "focal"])
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ELOOP, "", "x"),
            "cannot use x: too many levels of symbolic links: name another",
        ),
        (MemoryError("1 TiB"), "out of memory: what is read must fit (1 TiB)"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def refused(_: str) -> None:
        raise error

    monkeypatch.setattr(catalogue, "read_entry", refused)
    result = CliRunner().invoke(app, ["losses", "focal"])
    assert (result.exit_code, result.stderr) == (1, f"error: {line}\n")


def test_without_a_command_it_explains_itself():
    result = CliRunner().invoke(app, [])
    assert "losses" in result.output


def test_an_unknown_command_is_refused():
    assert CliRunner().invoke(app, ["lossess"]).exit_code == 2


class TestVerifyInvariance:
    def test_it_proves_an_evaluation_writes_the_table_and_exits_0(self, tmp_path: Path) -> None:
        output = call("verify", "invariance", "--part", "evaluation", "--output", str(tmp_path))
        assert "evaluation: 96 figures, all within their bounds" in output
        report = json.loads((tmp_path / "invariance.json").read_text())
        assert report["holds"] is True
        assert report["parts"].keys() == {"evaluation"}
        assert len(report["parts"]["evaluation"]["cells"]) == 96
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
