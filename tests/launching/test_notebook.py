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
from equiloss.errors import ConfigError, UserError
from equiloss.records.results import read_metrics
from support import ROOT, final_weights, slow

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
    one, two = final_weights(tmp_path / "here"), final_weights(tmp_path / "there")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("loss=focla", "unknown loss 'focla'. Did you mean 'focal'?"),
        ("trainer.max_epochs=many", "trainer.max_epochs"),
        ("data.batch_size=0", "data.batch_size must be positive, got 0"),
        ("optimizer.lr", "optimizer.lr"),
    ],
)
def test_a_wrong_word_is_named(word: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(word)
    assert line in str(caught.value)


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
