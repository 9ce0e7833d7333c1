"""The built wheel is whole: `train.py` and `conf/` run on it, away from the source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def requirements_of(name: str, extras: set[str]) -> list[Requirement]:
    """What a distribution that is installed here requires."""
    lines = metadata.requires(name) or []
    found = [Requirement(line) for line in lines]
    environments = [{"extra": extra} for extra in (*extras, "")]
    return [r for r in found if r.marker is None or any(map(r.marker.evaluate, environments))]


def test_the_lock_has_all_that_is_required_with_hashes_and_no_index() -> None:
    """`make lock` was forgotten where this fails."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            found = re.fullmatch(r"([a-z0-9._-]+)==([\w.+!]+) --hash=sha256:[0-9a-f]{64}", line)
            assert found, line
            pinned[canonicalize_name(found[1])] = found[2]
    waiting, seen = [("equiloss", frozenset({"dev", "sweep"}))], set()
    while waiting:
        entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        for requirement in requirements_of(entry[0], set(entry[1])):
            name = canonicalize_name(requirement.name)
            if name == "equiloss":
                continue
            assert name in pinned, f"{requirement} of {entry[0]} is not in requirements.lock"
            assert requirement.specifier.contains(pinned[name], prereleases=True), requirement
            # Another version, which the index may have had here, may require other things.
            if metadata.version(name) == pinned[name]:
                waiting.append((name, frozenset(requirement.extras)))
    assert len(seen) > 10
