"""examples/plugin, installed with pip: it is listed, trains, sweeps, and keeps the laws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.conformance.laws import LAWS
from equiloss.launching.composition_errors import explain, mendable
from equiloss.records.results import Result
from support import PYTHONPATH, ROOT, composed, slow, wrong_with

TEMPLATE = ROOT / "examples" / "plugin"
NAME, MODULE = "taylor_cross_entropy", "equiloss_taylor"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the plugin."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target"]
    # The build backend is one of the tests' own dependencies, so that nothing is downloaded.
    command = [*pip, str(target), "--no-build-isolation", str(TEMPLATE)]
    subprocess.run(command, check=True, timeout=300)
    return target


def run(site: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), PYTHONPATH])
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


@pytest.fixture
def on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where this process was started after the installation."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop(MODULE, None)


@pytest.mark.usefixtures("on_path")
def test_it_is_listed_with_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["losses", NAME, "--json"]
    shown = json.loads(CliRunner().invoke(app, command).stdout)
    assert shown["source"] == "equiloss-taylor 0.1.0"
    assert shown["options"]["order"] == 2
    monkeypatch.setenv("EQUILOSS_DISABLE_PLUGINS", "1")
    hidden = CliRunner().invoke(app, command)
    assert hidden.exit_code == 1
    assert f"unknown loss '{NAME}'" in hidden.stderr


FAST = ("debug=fast", "callbacks=quiet", "logger=csv")


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=slow)])
def test_it_trains(devices: int, site: Path, tmp_path: Path) -> None:
    trainer = ("trainer=ddp_cpu", f"trainer.devices={devices}", "hydra.run.dir=run")
    loss = (f"loss={NAME}", "loss.order=3")
    done = run(site, str(ROOT / "train.py"), *FAST, *loss, *trainer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = Result.read(tmp_path / "run")
    assert result.world_size == devices
    assert result.loss == {
        "name": NAME,
        "options": {"order": 3, "weight": None, "ignore_index": -100},
    }


@pytest.mark.usefixtures("on_path")
def test_an_option_of_another_type_is_refused() -> None:
    assert composed(f"loss={NAME}", "loss.order=3").config.loss["order"] == 3
    with pytest.raises(Exception, match=r".") as caught:  # of any type: Hydra composes
        composed(f"loss={NAME}", "loss.order=two")
    assert mendable(caught.value)
    line = explain(caught.value)
    assert wrong_with(line) is None
    assert line.startswith("loss.order")
    assert "two" in line


@slow
def test_its_options_are_swept(site: Path, tmp_path: Path) -> None:
    sweep = ("-m", f"loss={NAME}", "loss.order=1,2", "hydra.sweep.dir=sweep")
    done = run(site, str(ROOT / "train.py"), *sweep, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [Result.read(path.parent) for path in (tmp_path / "sweep").glob("*/results.json")]
    assert sorted(result.loss["options"]["order"] for result in found) == [1, 2]


@slow
def test_by_path_it_needs_no_installation(tmp_path: Path) -> None:
    by_path = ("loss=custom", f"loss.target={MODULE}:{NAME}", "loss.options.order=3")
    source = TEMPLATE / "src"
    done = run(source, str(ROOT / "train.py"), *by_path, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@slow
def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TEMPLATE / "tests"))
    done = run(site, *tests, "-c", os.devnull, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


class TestThePage:
    """docs/write-a-loss.md shows what there is."""

    PAGE = (ROOT / "docs" / "write-a-loss.md").read_text(encoding="utf-8")

    def test_its_function_is_that_of_the_template(self) -> None:
        shown = re.findall(r"^```python\n(.*?)^```", self.PAGE, flags=re.MULTILINE | re.DOTALL)[0]
        source = (TEMPLATE / "src" / MODULE / "__init__.py").read_text(encoding="utf-8")
        for line in shown.splitlines()[1:]:
            assert line in source

    def test_its_entry_point_is_that_of_the_template(self) -> None:
        (shown,) = re.findall(r"^```toml\n(.*?)^```", self.PAGE, flags=re.MULTILINE | re.DOTALL)
        project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
        assert tomllib.loads(shown)["project"]["entry-points"] == project["entry-points"]

    def test_it_has_every_law(self) -> None:
        rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", self.PAGE, flags=re.MULTILINE)
        laws = [
            (law.name, law.sentence, ", ".join(needed.name for needed in law.needs)) for law in LAWS
        ]
        assert [row for row in rows if row[0] != "law"] == laws
