"""examples/plugin, installed with pip: it is listed, trains, sweeps, and keeps the laws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from equiloss.conformance.laws import LAWS
from equiloss.records.results import Result
from support import PYTHONPATH, ROOT, slow

TEMPLATE = ROOT / "examples" / "plugin"
NAME = "taylor_cross_entropy"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the plugin."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target"]
    # The build backend is one of the tests' own dependencies, so that nothing is downloaded.
    command = [*pip, str(target), "--no-build-isolation", str(TEMPLATE)]
    subprocess.run(command, check=True, timeout=300)
    return target


def run(site: Path, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), PYTHONPATH])
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **variables},
        check=False,
    )


def test_it_is_listed_with_its_distribution(site: Path, tmp_path: Path) -> None:
    command = ("-c", "from equiloss.cli import app; app()", "losses", NAME, "--json")
    shown = json.loads(run(site, *command, cwd=tmp_path).stdout)
    assert shown["source"] == "equiloss-taylor 0.1.0"
    assert shown["options"]["order"] == 2
    hidden = run(site, *command, cwd=tmp_path, EQUILOSS_DISABLE_PLUGINS="1")
    assert hidden.returncode == 1
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


def test_an_option_of_another_type_is_refused(site: Path, tmp_path: Path) -> None:
    done = run(site, str(ROOT / "train.py"), f"loss={NAME}", "loss.order=two", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "two" in done.stderr


@slow
def test_its_options_are_swept(site: Path, tmp_path: Path) -> None:
    sweep = ("-m", f"loss={NAME}", "loss.order=1,2", "hydra.sweep.dir=sweep")
    done = run(site, str(ROOT / "train.py"), *sweep, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [Result.read(path.parent) for path in (tmp_path / "sweep").glob("*/results.json")]
    assert sorted(result.loss["options"]["order"] for result in found) == [1, 2]


@slow
def test_by_path_it_needs_no_installation(tmp_path: Path) -> None:
    by_path = ("loss=custom", f"loss.target=equiloss_taylor:{NAME}", "loss.options.order=3")
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
        source = (TEMPLATE / "src" / "equiloss_taylor" / "__init__.py").read_text(encoding="utf-8")
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
