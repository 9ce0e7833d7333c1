"""The built wheel is whole: a new project trains on it and predicts, away from the source tree."""

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
from PIL import Image

from equiloss.records.results import Result
from support import ROOT, slow


@slow  # builds and installs a wheel
def test_a_new_project_runs_on_the_built_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True, timeout=300
    )
    (wheel,) = tmp_path.glob("equiloss-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)

    def called(*words: str, cwd: Path = tmp_path / "demo") -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # It is the wheel that runs, not this source tree.
    where = called("-c", "import equiloss; print(equiloss.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "site"))
    written = called("-m", "equiloss", "new", "demo", cwd=tmp_path).splitlines()
    assert written[-1] == "next: cd demo && equiloss train experiment=small"
    code = [file for file in (tmp_path / "demo").rglob("*") if file.suffix in (".py", ".yaml")]
    assert sum(len(file.read_text().splitlines()) for file in code) < 100
    words = ("experiment=small", "trainer.devices=2", "trainer.max_epochs=1")
    called("train.py", *words, "callbacks=quiet", "hydra.run.dir=run")
    result = Result.read(tmp_path / "demo" / "run")
    assert (result.status, result.world_size, result.loss["name"]) == ("completed", 2, "custom")
    Image.new("L", (8, 8)).save(tmp_path / "demo" / "black.png")
    own = ("--target", "my_network:Small")
    assert "black.png" in called("-m", "equiloss", "predict", "run", "black.png", *own)


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
