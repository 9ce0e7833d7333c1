"""TensorBoard on a finished sweep, seen with a real browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pictures
from equiloss.report.compare import LINKS
from support import ROOT

LOSSES = {"softmax_nll", "log_softmax_nll", "cross_entropy"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (pictures.find("chromium") and pictures.find("chromedriver")),
        reason="chromium and chromedriver are not installed",
    ),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("browser") / "losses"
    command = ["-m", "sweep=losses", "seed=0", "debug=fast", "callbacks=quiet"]
    small = ["model.options.widths=[8,16]", f"hydra.sweep.dir={directory}"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *command, *small], check=True)
    return directory


@pytest.fixture(scope="module")
def browser(sweep: Path) -> Iterator[pictures.Browser]:
    with pictures.tensorboard(sweep / "report" / LINKS) as address:
        browser = pictures.Browser(address)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[str]:
    """Names that say the loss and the seed."""
    names = [path.name for path in (sweep / "report" / LINKS).iterdir()]
    assert {*names} == {f"{loss} s0" for loss in LOSSES}
    return names


def test_the_runs_are_there(browser: pictures.Browser, runs: list[str]) -> None:
    browser.open("timeseries", [*runs, "test", "train", "val", "verification"])


def test_hparams_show_what_was_swept_and_what_came_out(
    browser: pictures.Browser, sweep: Path, runs: list[str]
) -> None:
    columns = ["loss.name", "seed", "optimizer.lr", "trainer.devices", "val/nll", "test/acc"]
    words = browser.open("hparams", [*columns, "Trial ID", *runs])
    # The table comes after the list of what could be in it.
    table = words[words.index("Trial ID") :]
    assert table.index("loss.name") < table.index("seed") < table.index("val/nll")
    # Each run has its row: the name, then its values.
    for run in runs:
        row = table[table.index(run) :]
        assert row[1] == run.removesuffix(" s0")


def test_the_formulations_share_custom_charts(browser: pictures.Browser) -> None:
    charts = ["loss error (nats)", "gradient error (mass × d loss / d logits)", "error / bound"]
    # Three runs, each with a curve for each formulation.
    curves = ["Matches (9)"] * len(charts)
    browser.open("custom_scalars", [*charts, *curves, "loss (nats)", "accuracy"])


def test_figures_are_shown(browser: pictures.Browser, runs: list[str]) -> None:
    browser.open("images", [*runs, *["test/confusion", "test/worst_images"] * len(runs)])
