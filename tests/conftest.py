"""What the tests share: running a configuration here, and running `train.py`."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tomllib
from multiprocessing import forkserver
from pathlib import Path

import pytest

import forks
from equiloss.records.results import Result
from support import PYTHONPATH, QUIET, ROOT, TESTS, Install, Run, Train, composed

# A distribution of its own, with modules that cannot be imported.
collect_ignore = ["plugin"]


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_remembered_at_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["EQUILOSS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _ranks_are_forked_from_a_process_that_has_imported_everything() -> None:
    """Importing Lightning takes seconds, and hundreds of ranks would do so one by one."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(forks.PRELOAD)
    forkserver.ensure_running()


@pytest.fixture
def run_here(tmp_path: Path) -> Run:
    """Run a configuration in this process: `run_here("loss=softmax_nll", directory=…)`."""
    from equiloss.run import run

    def call(*overrides: str, directory: Path = tmp_path / "run") -> Result:
        directory.mkdir(parents=True, exist_ok=True)
        return run(composed(*QUIET, *overrides), directory)

    return call


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run `train.py` as a user does; returns the completed process.

    In a fork of an interpreter that has imported everything, which spares the time; in one of its
    own if it asks for that, or for variables of the environment, as the README's commands are.
    """

    def call(
        *arguments: str,
        timeout: float = 120,
        cwd: Path = tmp_path,
        anew: bool = False,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": PYTHONPATH, **environment}
        if not (anew or environment):
            return forks.completed(arguments, cwd=cwd, timeout=timeout, environment=variables)
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env=variables,
            check=False,
        )

    return call


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a plugin on the path as pip would: its modules, and a .dist-info with entry points."""

    def call(distribution: str, version: str, entry_points: str, **modules: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[equiloss.losses]\n{entry_points}\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(site)

    return call


@pytest.fixture
def mutants(install: Install, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses of tests/plugin, installed; returns their names."""
    project = tomllib.loads((TESTS / "plugin" / "pyproject.toml").read_text())["project"]
    losses = project["entry-points"]["equiloss.losses"]
    lines = (f"{name} = {target}" for name, target in losses.items())
    install(project["name"], project["version"], "\n".join(lines))
    monkeypatch.syspath_prepend(TESTS / "plugin" / "src")
    return list(losses)
