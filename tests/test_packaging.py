"""The built wheel is whole: `train.py` and `conf/` run on it, away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from equiloss.records.results import Result
from support import ROOT


def test_train_runs_on_the_built_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True, timeout=300
    )
    (wheel,) = tmp_path.glob("equiloss-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    away = tmp_path / "away"
    shutil.copytree(ROOT / "conf", away / "conf")
    shutil.copy(ROOT / "train.py", away)
    done = subprocess.run(
        [sys.executable, "train.py", "debug=fast", "trainer.devices=2", "hydra.run.dir=run"],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Result.read(away / "run").world_size == 2
    # It was the wheel that ran, not this source tree.
    where = subprocess.run(
        [sys.executable, "-c", "import equiloss; print(equiloss.__file__)"],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(tmp_path / "site"))
