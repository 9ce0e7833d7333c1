"""What the tests share: running a configuration here, and running `train.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equiloss.results import Result
from support import PYTHONPATH, QUIET, ROOT, Run, Train, composed


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
    """Run `train.py` as a user does; returns the completed process."""

    def call(
        *arguments: str, timeout: float = 120, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
            check=False,
        )

    return call
