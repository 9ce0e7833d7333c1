"""Runs from Python: what `from equiloss import compose, fit, load` gives."""

from __future__ import annotations

import importlib
import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import equiloss
from equiloss import compose, fit, load
from equiloss.data.datasets import load as load_data
from equiloss.data.sampler import Slice
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import ConfigError, UserError
from equiloss.launching import notebook, ranks
from equiloss.records.results import Result, read_metrics
from equiloss.records.run_dir import TRACEBACK
from support import ROOT, final_weights, slow, wrong_with

PAGE = (ROOT / "docs" / "use.md").read_text()
FAST = ("debug=fast", "callbacks=quiet", "logger=csv", "model=mlp", "trainer.threads=1")


def test_three_lines(tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    config = compose(*FAST, "loss=focal")
    done = fit(config, tmp_path / "run")
    model = load(done)
    assert done.result.status == "completed"
    assert done.metrics["test/acc"] == done.result.metrics["test/acc"]
    steps, values = done.curves["train/loss"]
    assert steps.dtype == np.int64
    assert values.tolist() == read_metrics(tmp_path / "run", "train/loss")
    assert steps.tolist() == list(range(len(values)))
    source = load_data(config.config.data).test
    found = model.predict(source.read(Slice(0, torch.arange(len(source)))))
    right = int((found.indices == source.targets).sum())
    assert right == round(done.metrics["test/acc"] * len(source))
    assert model.classes == tuple("0123456789")
    # Nothing is left behind.
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert fit(config, tmp_path / "run").metrics == done.metrics  # which is shown, and not repeated


@slow
def test_two_ranks_from_python_are_those_of_the_command(tmp_path: Path) -> None:
    words = (*FAST, "trainer=ddp_cpu", "trainer.devices=2")
    done = fit(compose(*words), tmp_path / "here")
    assert done.result.world_size == 2
    command = [sys.executable, "-m", "equiloss", "train", *words, "hydra.run.dir=there"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    # Whoever starts it: Hydra would name the log after the module.
    assert [file.name for file in (tmp_path / "there").glob("*.log")] == ["train.log"]
    one, two = final_weights(tmp_path / "here"), final_weights(tmp_path / "there")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("loss=focla", "unknown loss 'focla'. Did you mean 'focal'?"),
        ("trainer.max_epochs=many", "trainer.max_epochs"),
        ("data.batch_size=0", "data.batch_size must be positive, got 0"),
        ("optimizer.lr", "optimizer.lr"),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
        ("data.root=${oc.env:NO_SUCH}", "data.root: \"Environment variable 'NO_SUCH' not found\""),
        ("model=null", "a group takes the name of a file of conf/"),
        ("run=somewhere", "run=somewhere is evaluated, by task=test or task=validate"),
    ],
)
def test_a_wrong_word_is_named(word: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(word)
    assert line in str(caught.value)
    assert wrong_with(str(caught.value)) is None


def test_files_of_a_project_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("name: mlp\noptions: {widths: [3]}\n")
    monkeypatch.chdir(tmp_path)
    assert compose("model=mine").config.model.options == {"widths": [3]}
    assert compose("optimizer=adamw").config.optimizer.name == "AdamW"  # shipped


def test_a_run_is_evaluated_by_its_own_configuration(tmp_path: Path) -> None:
    done = fit(compose(*FAST, "loss=focal"), tmp_path / "run")
    config = compose("task=test", f"run={tmp_path / 'run'}")
    assert config.config.loss["name"] == "focal"
    again = fit(config, tmp_path / "again")
    assert again.metrics["test/nll"] == done.metrics["test/nll"]


def test_a_run_that_fails_is_recorded(tmp_path: Path) -> None:
    config = compose(*FAST, "data=image_folder", f"data.root={tmp_path}/none")
    with pytest.raises(UserError) as caught:
        fit(config, tmp_path / "run")
    result = Result.read(tmp_path / "run")
    assert (result.status, result.error) == ("failed", str(caught.value))
    assert "Traceback" in (tmp_path / "run" / TRACEBACK).read_text()


def test_data_are_fetched_once_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("equiloss.data.datasets.load", lambda _: seen.append("data"))
    monkeypatch.setattr(ranks, "supervise", lambda *_: seen.append("ranks"))
    words = ("trainer=ddp_cpu", "trainer.devices=2", "data.download=true")
    with pytest.raises(UserError, match="every rank ended without an error, and without the run's"):
        fit(compose(*FAST, *words), tmp_path / "run")
    assert seen == ["data", "ranks"]


def test_an_interrupted_run_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    stopping = f"{__name__}:stopping"
    monkeypatch.setattr(notebook, "RUN", stopping)
    with pytest.raises(Interrupted):
        fit(compose(*FAST), place)
    assert Result.read(place).status == "interrupted"
    assert f"interrupted by SIGINT after 0 steps: fit(config, '{place}') goes on" in (
        capsys.readouterr().err
    )


def stopping(_: object, place: Path) -> None:
    """A run that is interrupted with a state on disk."""
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "last.ckpt").write_bytes(b"")
    raise Interrupted("SIGINT", 130)


def test_a_users_own_directory_is_found() -> None:
    words = ("data=image_folder", "data.root='~/pictures'")
    assert compose(*words).config.data.root == str(Path("~/pictures").expanduser())


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(compose(*FAST), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a completed run of another configuration"):
        fit(compose(*FAST, "seed=1"), tmp_path / "run")


def test_the_public_names_are_there() -> None:
    assert {name: callable(getattr(equiloss, name)) for name in equiloss.__all__} == {
        "compose": True,
        "fit": True,
        "load": True,
    }
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = equiloss.fitt  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["equiloss", "equiloss.losses", "equiloss.testing"])
def test_what_is_public_is_documented(module: str) -> None:
    public = importlib.import_module(module)
    (row,) = re.findall(rf"^\| `{module}` \|(.*)$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == set(public.__all__)
    for name in public.__all__:
        assert inspect.getdoc(getattr(public, name))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, equiloss; print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
