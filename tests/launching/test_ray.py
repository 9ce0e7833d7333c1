"""Sweeps through Ray on this machine (make ray: its launcher needs an environment of its own)."""

from __future__ import annotations

from pathlib import Path

import pytest

from equiloss.launching import slots
from equiloss.records.results import Result
from support import Train, composed_with_hydra

pytestmark = pytest.mark.ray

FAST = ("debug=fast", "callbacks=quiet", "model.options.widths=[8,16]", "logger=csv")


@pytest.fixture(autouse=True)
def needs_ray() -> None:
    pytest.importorskip("ray", reason="pip install 'equiloss[ray]'")


@pytest.mark.parametrize(("options", "parallel"), [((), len(slots.cores())), (("=4",), 1)])
def test_how_many_jobs_run_at_once(options: tuple[str, ...], parallel: int) -> None:
    processors = [f"+hydra.launcher.ray.remote.num_cpus{value}" for value in options]
    hydra = composed_with_hydra("sweep=losses", "hydra/launcher=ray", *processors).hydra
    assert slots.parallel_jobs(hydra, 6) == min(parallel, 6)


def test_three_losses_on_two_ranks(train: Train, tmp_path: Path) -> None:
    sweep = (f"hydra.sweep.dir={tmp_path}/sweep", "hydra/launcher=ray", "sweep=losses", "seed=0")
    command = ("-m", *sweep, "trainer=ddp_cpu", "trainer.devices=2", *FAST)
    done = train(*command, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [Result.read(path.parent) for path in (tmp_path / "sweep").glob("*/results.json")]
    assert [result.world_size for result in found] == [2] * 3
    assert [result.status for result in found] == ["completed"] * 3
    assert "verdict: match" in done.stdout
    # Again: nothing is left to do.
    done = train(*command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("completed earlier") == 3


def test_a_job_that_fails_ends_no_other(train: Train, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    bad = "loss.label_smoothing=0.1,2"  # out of its range: the second job fails
    ray = ("hydra/launcher=ray", f"hydra.sweep.dir={directory}")
    done = train("-m", *ray, bad, *FAST, timeout=300)
    assert done.returncode == 1
    assert "label_smoothing" in done.stderr
    found = [Result.read(path.parent) for path in directory.glob("*/results.json")]
    assert sorted(result.status for result in found) == ["completed", "failed"]
