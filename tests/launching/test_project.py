"""A project of one's own on the installed package: its files come before the shipped ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.config import resolved
from equiloss.config.shipped import CONF, PROJECT
from equiloss.errors import ConfigError
from equiloss.launching.project import new
from equiloss.losses import config_source
from support import slow


def test_files_of_a_project_hide_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mlp.yaml").write_text("name: mlp\noptions: {widths: [3]}\n")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("name: convnet\n")
    resolved.register_schema()
    config_source.install()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        assert compose("config", ["model=mlp"]).model.options.widths == [3]
        assert compose("config", ["model=mine"]).model.name == "convnet"
        assert compose("config", ["optimizer=adamw"]).optimizer.name == "AdamW"  # shipped
        # Its log is train.log, whatever its script is called.
        assert compose("config", return_hydra_config=True).hydra.job.name == "train"
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        assert compose("config", ["model=mlp"]).model.options.widths == [128, 128]


def test_a_new_project_is_a_copy(tmp_path: Path) -> None:
    files = new(tmp_path / "demo")
    names = {str(file.relative_to(tmp_path / "demo")) for file in files}
    assert {"train.py", "my_loss.py", "my_network.py", "conf/experiment/small.yaml"} <= names
    for file in files:
        assert file.read_text() == (PROJECT / file.relative_to(tmp_path / "demo")).read_text()


def test_what_cannot_be_copied_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise shutil.Error([("here", "there", "[Errno 28] No space left"), ("a", "b", "why")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ConfigError) as caught:
        new(tmp_path / "demo")
    assert str(caught.value) == f"cannot write {tmp_path / 'demo'}: [Errno 28] No space left"


@pytest.mark.parametrize("there", ["file", "directory"])
def test_what_is_there_is_left_alone(tmp_path: Path, there: str) -> None:
    place = tmp_path / "demo"
    if there == "directory":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        place.write_text("mine")
    done = CliRunner().invoke(app, ["new", str(place)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"error: {place} is there already: name a new or an empty directory\n"


@slow
def test_its_own_tests_pass(tmp_path: Path) -> None:
    new(tmp_path / "demo")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path / "demo", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
