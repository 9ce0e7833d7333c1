"""`sweep.parallel`: jobs side by side in forks are the jobs that they are one by one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from equiloss.config import Config, TrainerConfig
from equiloss.config.sweep import SweepConfig
from equiloss.data import datasets
from equiloss.distributed import membership
from equiloss.errors import ConfigError
from equiloss.launching import forks, slots
from equiloss.records.ledger import Entry, Ledger
from equiloss.records.results import Result
from processes import BOTH, children, start_sweep, until_rows
from support import Train, composed, slow

FAST = ("debug=fast", "callbacks=quiet", "model.options.widths=[8,16]", "logger=csv")
AT_ONCE = "sweep.parallel=2"


def done(sweep_dir: Path) -> list[Result]:
    return [Result.read(path.parent) for path in sorted(sweep_dir.glob("*/results.json"))]


def newest(sweep_dir: Path) -> list[Entry]:
    attempt = Ledger(sweep_dir).attempt()
    assert attempt is not None
    return [*Ledger(sweep_dir).newest(attempt.attempt).values()]


def test_side_by_side_they_give_what_they_give_one_by_one(train: Train, tmp_path: Path) -> None:
    found = {}
    for name, how in (("one", ()), ("two", (AT_ONCE,))):
        command = ("-m", BOTH, *FAST, "trainer.threads=1", f"hydra.sweep.dir={tmp_path}/{name}")
        ended = train(*command, *how, timeout=240)
        assert ended.returncode == 0, ended.stderr
        assert "2 of 2 done" in ended.stdout
        found[name] = done(tmp_path / name)
    for alone, beside in zip(found["one"], found["two"], strict=True):
        assert alone.loss == beside.loss
        del alone.metrics["train/samples_per_s"], beside.metrics["train/samples_per_s"]
        assert alone.metrics == beside.metrics
    lines = ended.stdout.splitlines()
    assert {line[:3] for line in lines if "run directory" in line} == {"#0 ", "#1 "}
    # Again: nothing is left to do.
    again = train(*command, *how)
    assert again.stdout.count("completed already") == 2


@slow
@pytest.mark.skipif(len(slots.cores()) < 2, reason="there is one core to share")
def test_they_run_at_the_same_time_on_cores_of_their_own(tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path / "sweep", "sweep.parallel=auto", "trainer.threads=null")
    until_rows(tmp_path / "sweep", 4)
    cores = [os.sched_getaffinity(child) for child in children(sweep.pid)]
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, output
    assert len(cores) == 2
    assert not cores[0] & cores[1]
    assert {result.environment["threads"] for result in done(tmp_path / "sweep")} == {len(cores[0])}


@slow
def test_a_job_that_fails_or_is_killed_ends_no_other(train: Train, tmp_path: Path) -> None:
    bad = "loss.label_smoothing=0.1,2"  # out of its range: the second job fails
    words = (*FAST, bad, AT_ONCE, f"hydra.sweep.dir={tmp_path}/fails")
    ended = train("-m", *words, timeout=240)
    assert ended.returncode == 1
    assert "label_smoothing" in ended.stderr.splitlines()[-1]
    assert [entry.status for entry in newest(tmp_path / "fails")] == ["completed", "failed"]

    sweep = start_sweep(tmp_path / "killed", AT_ONCE)
    until_rows(tmp_path / "killed", 4)
    os.kill(children(sweep.pid)[0], signal.SIGKILL)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    lost, whole = newest(tmp_path / "killed")
    assert (lost.status, whole.status) == ("failed", "completed")
    assert lost.error == "its process ended with SIGKILL"
    assert f"error: job 0 ({lost.directory}): {lost.error}" in output
    assert "Traceback" not in output


def test_what_hydra_raises_is_one_line(train: Train, tmp_path: Path) -> None:
    words = (*FAST, BOTH, AT_ONCE, f"hydra.sweep.dir={tmp_path}/sweep")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "in_the_way").write_text("")
    subdir = "hydra.sweep.subdir='in_the_way/${loss.name}'"
    ended = train("-m", *words, subdir, timeout=240)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert [entry.status for entry in newest(tmp_path / "sweep")] == ["failed", "failed"]
    assert "in_the_way" in newest(tmp_path / "sweep")[0].error


def test_a_search_leaks_nothing_and_runs_no_job_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two and of one, as a search of three trials has them."""
    forks.install()
    config = OmegaConf.create(
        {
            "sweep": {"parallel": 2},
            "data": {"download": True, "name": "nowhere"},
            "hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {}},
            "objective": "val/nll",
        }
    )
    launcher = forks.ForkLauncher()
    launcher.config = config
    monkeypatch.setattr(forks, "_import_for_all", lambda: None)
    fetched = tmp_path / "fetched"
    monkeypatch.setattr(datasets, "load", lambda data: fetched.write_text(data.name))
    monkeypatch.setattr(
        BasicLauncher,
        "launch",
        lambda _, jobs, number: [JobReturn(jobs[0], _return_value=(os.getpid(), number))],
    )
    before = set(Path("/proc/self/fd").iterdir())
    for first, jobs in ((0, [["a=1"], ["a=2"]]), (2, [["a=3"]])):
        returned = launcher.launch(jobs, first)
        assert [each.overrides for each in returned] == jobs
        found = [each._return_value for each in returned]
        assert [number for _, number in found] == [first + n for n in range(len(jobs))]
        assert os.getpid() not in {pid for pid, _ in found}
        assert fetched.read_text() == "nowhere"
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_under_another_launcher_jobs_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = forks.ForkLauncher()
    launcher.config = OmegaConf.create({"sweep": {"parallel": 2}})
    monkeypatch.setattr(membership, "external", lambda: membership.Membership("srun", 0, 2, 0, 2))
    monkeypatch.setattr(BasicLauncher, "launch", lambda _, jobs, number: "one by one")
    assert launcher.launch([["a=1"], ["a=2"]], 0) == "one by one"


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_job_once(number: signal.Signals, tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path / "sweep", AT_ONCE)
    until_rows(tmp_path / "sweep", 6)
    sweep.send_signal(number)
    output, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 128 + number, output
    assert [entry.status for entry in newest(tmp_path / "sweep")] == ["interrupted"] * 2
    # Saved after their steps, not broken off.
    assert output.count("goes on") == 2
    again = start_sweep(tmp_path / "sweep", AT_ONCE)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert [len(result.segments) for result in done(tmp_path / "sweep")] == [2, 2]
    assert [result.steps["taken"] for result in done(tmp_path / "sweep")] == [8, 8]


@slow
def test_no_job_outlives_a_sweep_that_is_killed(tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path / "sweep", AT_ONCE, "trainer.max_steps=1000")
    until_rows(tmp_path / "sweep", 4)
    jobs = children(sweep.pid)
    assert len(jobs) == 2
    sweep.kill()
    sweep.communicate()
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{job}").exists() for job in jobs):
        assert time.monotonic() < give_up
        time.sleep(0.1)


@slow
@pytest.mark.parametrize(
    "words",
    [
        ("sweep=losses", "seed=0", "trainer=ddp_cpu", "trainer.devices=2"),
        ("sweep=optuna_lr", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"),
    ],
    ids=["two ranks each", "a search"],
)
def test_jobs_of_ranks_and_of_a_search(
    words: tuple[str, ...], train: Train, tmp_path: Path
) -> None:
    ended = train("-m", *words, *FAST, AT_ONCE, f"hydra.sweep.dir={tmp_path}/sweep", timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert [result.status for result in done(tmp_path / "sweep")] == ["completed"] * 3
    assert "3 of 3 done" in ended.stdout


@pytest.mark.parametrize("parallel", [0, -1, 1.5, "many", True, None])
def test_a_number_of_jobs_that_is_none_is_refused(parallel: object) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.parallel is a positive number of jobs, or auto"):
        SweepConfig(parallel)


@pytest.mark.parametrize(
    ("trainer", "jobs"),
    [
        (TrainerConfig(), 6),
        (TrainerConfig(devices=2), 3),
        (TrainerConfig(threads=2), 3),
        (TrainerConfig(devices=4, threads=2), 1),
        (TrainerConfig(accelerator="gpu"), 3),
        (TrainerConfig(accelerator="gpu", devices=2), 1),
    ],
)
def test_auto_fills_the_machine(
    trainer: TrainerConfig, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "cores", lambda: [*range(6)])
    monkeypatch.setenv(slots.VISIBLE, "0,1,2")
    config: Config = composed("sweep.parallel=auto").config
    config.trainer = trainer
    assert slots.at_once(config) == jobs


def test_how_jobs_are_launched_makes_no_other_run() -> None:
    alone, beside = composed(), composed("sweep.parallel=2")
    assert alone.config.sweep.parallel == 1
    assert {key for key in alone.plain if alone.plain[key] != beside.plain[key]} == {"sweep"}
