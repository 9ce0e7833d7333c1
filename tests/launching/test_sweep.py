"""Sweeps: the same command finds its runs again, whatever launched or ended them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.config import TrainerConfig, resolved
from equiloss.distributed import membership
from equiloss.errors import ConfigError, RecordError
from equiloss.invariance.interruption import bits
from equiloss.launching import slots, sweep_table
from equiloss.launching.sweep import direction, what_varies
from equiloss.records.ledger import ATTEMPT, Ledger
from equiloss.records.results import Result
from equiloss.records.writing import FileError
from equiloss.run import run
from processes import BOTH, SLOW_STEPS, start_sweep, until_rows
from support import PYTHONPATH, ROOT, Train, composed, composed_with_hydra, slow

FAST = ("debug=fast", "callbacks=quiet", "model.options.widths=[8,16]", "logger=csv")
THREE_BY_TWO = ("sweep=losses", "seed=0", "trainer=ddp_cpu", "trainer.devices=2", *FAST)
TWO_BY_TWO = (BOTH, *THREE_BY_TWO[1:])


def results(sweep_dir: Path) -> list[Result]:
    return [Result.read(path.parent) for path in sorted(sweep_dir.glob("*/results.json"))]


class TestNames:
    @pytest.mark.parametrize("change", ["seed=2", "+trainer.benchmark=true"])
    def test_another_command_is_another_sweep(self, change: str) -> None:
        before = ["loss=a,b", "seed=1"]
        assert resolved.sweep_name(None, before) != resolved.sweep_name(None, [*before, change])

    def test_what_only_a_person_sees_does_not_count(self) -> None:
        before = ["sweep=losses", "seed=1"]
        after = ["progress_bar=false", *reversed(before), "in_use=wait"]
        assert resolved.sweep_name("losses", before) == resolved.sweep_name("losses", after)

    def test_the_directory_is_named_by_the_choice(self) -> None:
        assert composed_with_hydra("sweep=losses").hydra.sweep.dir == "runs/losses"


class TestWhatVaries:
    @pytest.mark.parametrize(
        ("overrides", "keys", "jobs"),
        [
            (["sweep=losses"], ["loss", "seed"], 6),
            (["sweep=losses", "seed=1,2,3"], ["loss", "seed"], 9),
            (["sweep=losses", "seed=3"], ["loss"], 3),
            (
                ["loss=softmax_nll,cross_entropy", "trainer.devices=1,2", "seed=3"],
                ["loss", "trainer.devices"],
                4,
            ),
            (["seed=range(0,5)"], ["seed"], 5),
            (
                ["sweep=optuna_lr", "hydra.sweeper.n_trials=7"],
                ["optimizer.lr", "optimizer.weight_decay"],
                7,
            ),
            (["optimizer.lr=interval(0.1,1)", "seed=1,2"], ["optimizer.lr", "seed"], 0),
        ],
    )
    def test_of_a_command(self, overrides: list[str], keys: list[str], jobs: int) -> None:
        config = composed_with_hydra(
            *(text for text in overrides if "," not in text and "(" not in text)
        )
        config.hydra.overrides.task = [text for text in overrides if not text.startswith("hydra")]
        assert what_varies(config) == (keys, jobs)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setenv(ATTEMPT, "now")
    return Ledger(tmp_path)


class TestLedger:
    def test_the_newest_line_of_each_job_counts(self, ledger: Ledger, monkeypatch) -> None:
        ledger.add(1, "b", "running")
        ledger.add(0, "a", "running")
        ledger.add(0, "a", "completed", objective=0.5)
        monkeypatch.setenv(ATTEMPT, "earlier")
        ledger.add(1, "b", "failed", error="no memory")
        found = ledger.newest("now")
        assert [(job, entry.status) for job, entry in found.items()] == [
            (0, "completed"),
            (1, "running"),
        ]

    def test_a_line_that_a_crash_cut_short_is_left_out(self, ledger: Ledger) -> None:
        ledger.add(0, "a", "completed")
        with ledger.path.open("a") as file:
            file.write('{"attempt": "now", "job": 1, "dir')
        assert list(ledger.newest("now")) == [0]

    def test_the_line_after_half_a_line_counts(self, ledger: Ledger) -> None:
        """Several processes may write it, each sure that it is the first to do so."""
        ledger.path.write_text('{"attempt": "now", "job": 1, "dir')
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda job: ledger.add(job, "a", "completed"), range(200)))
        ledger.begin("now", jobs=200, objective="val/nll", direction="minimize")
        assert list(ledger.newest("now")) == list(range(200))
        assert ledger.attempt() is not None
        assert ledger.damaged() == 1

    @pytest.mark.parametrize(
        "line", ["{}", "[]", "3", "\0", "[" * 9999, '{"job": 1}', '{"attempt": []}']
    )
    def test_a_line_that_says_nothing_is_counted(self, line: str, ledger: Ledger) -> None:
        ledger.begin("now", jobs=2, objective="val/nll", direction="minimize")
        with ledger.path.open("a") as file:
            file.write(f"{line}\n")
        ledger.add(0, "a", "completed")
        assert list(ledger.newest("now")) == [0]
        _, text = sweep_table.table(ledger.path.parent)
        assert text.endswith("1 damaged line in ledger.jsonl")

    @pytest.mark.parametrize("job", [[], 1.5, True, None, 10**400])
    def test_an_entry_of_another_form_is_damage(self, job: object, ledger: Ledger) -> None:
        ledger.add(0, "a", "completed")
        entry = json.loads(ledger.path.read_text())
        with ledger.path.open("a") as file:
            file.write(json.dumps(entry | {"job": job}) + "\n")
        assert list(ledger.newest("now")) == [0]
        assert ledger.damaged() == 1

    def test_a_file_of_another_kind_is_refused(self, ledger: Ledger) -> None:
        ledger.path.write_text("garbage\n" * 2000)
        with pytest.raises(RecordError, match=r"ledger.jsonl has more than 1000 damaged lines: "):
            ledger.attempt()
        ledger.path.unlink()
        ledger.path.symlink_to("elsewhere")
        with pytest.raises(FileError, match=r"ledger\.jsonl: too many levels of symbolic links"):
            ledger.add(0, "a", "completed")

    def test_an_objective_that_is_not_finite_is_none(self, ledger: Ledger) -> None:
        ledger.add(0, "a", "completed", objective=float("nan"))
        assert json.loads(ledger.path.read_text())["objective"] is None

    def test_the_newest_attempt(self, ledger: Ledger) -> None:
        assert ledger.attempt() is None
        for attempt, jobs in (("earlier", 6), ("now", 4)):
            ledger.begin(attempt, jobs=jobs, objective="val/nll", direction="minimize")
        for attempt, jobs in ((None, 4), ("now", 4), ("earlier", 6)):
            found = ledger.attempt(attempt)
            assert found is not None
            assert found.jobs == jobs

    def test_direction(self) -> None:
        def of(objective: str, sweeper: dict[str, str], **extra: Any) -> str:
            config = {"objective": objective, "metrics": {"extra": extra}}
            return direction(sweeper, OmegaConf.create(config))

        assert of("val/nll", {}) == "minimize"
        assert of("test/acc_top5", {}) == "maximize"
        assert of("test/acc", {"direction": "minimize"}) == "minimize"
        assert of("val/f1", {}, f1="F1Score", h="HammingDistance") == "maximize"
        assert of("val/h", {}, f1="F1Score", h="HammingDistance") == "minimize"
        assert of("val/x", {}, x={"target": "a:B", "mode": "max"}) == "maximize"
        # Their jobs say why they fail.
        assert of("val/x", {}, x="NoSuchMetric") == of("val/x", {}, x=3) == "minimize"


def rows_of(output: str) -> list[str]:
    """Rows of a table, those that begin with a number."""
    return [" ".join(row.split()) for row in output.splitlines() if row.strip()[:1].isdigit()]


class TestProgress:
    @pytest.fixture
    def begun(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
        """Two jobs of six done, one failed, one at work."""
        monkeypatch.setenv(ATTEMPT, "now")
        ledger = Ledger(tmp_path)
        ledger.begin("now", jobs=6, objective="val/acc", direction="maximize")
        ledger.add(0, "a", "completed", objective=0.25, skipped=True)
        ledger.add(1, "b", "completed", objective=0.75, seconds=90.0)
        ledger.add(2, "c", "failed", error="no memory", seconds=3.0)
        ledger.add(3, "d", "running")
        return ledger

    def test_in_one_line(self, begun: Ledger, tmp_path: Path) -> None:
        line = sweep_table.line(tmp_path, "now")
        assert line.startswith(f"sweep {tmp_path.name}: 2 done, 1 running, 1 failed, 2 left, about")
        assert line.endswith("best val/acc 0.75 in b")

    def test_what_was_interrupted_tells_no_time(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv(ATTEMPT, "now")
        ledger = Ledger(tmp_path)
        ledger.begin("now", jobs=2, objective="val/acc", direction="maximize")
        ledger.add(0, "a", "interrupted", seconds=3.0)
        line = sweep_table.line(tmp_path, "now")
        assert line.endswith("0 done, 0 running, 1 interrupted, 1 left")

    def test_the_best_by_the_other_direction(self, begun: Ledger, tmp_path: Path) -> None:
        begun.begin("now", jobs=6, objective="val/nll", direction="minimize")
        assert sweep_table.line(tmp_path, "now").endswith("best val/nll 0.25 in a")

    def test_as_a_table(self, begun: Ledger, tmp_path: Path) -> None:
        shown = CliRunner().invoke(app, ["sweep", str(tmp_path)])
        assert shown.exit_code == 0
        *ended, at_work = rows_of(shown.output)
        assert ended == [
            "1 b completed 0.75 (best) 2 min",
            "0 a completed earlier 0.25",
            "2 c failed 3 s",
        ]
        assert at_work.startswith("3 d running ")
        assert "2 left" in shown.output

    def test_what_was_swept_has_columns(
        self, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        swept = ["loss", "optimizer.lr"]
        ledger.begin("now", jobs=2, objective="val/nll", direction="minimize", swept=swept)
        for job, (loss, value) in enumerate((("balanced", 0.5), ("focal", 0.25))):
            overrides = [f"loss={loss}", "optimizer.lr=0.05", "+trainer.benchmark=true"]
            ledger.add(job, "dir", "completed", objective=value, seconds=1.0, overrides=overrides)
        shown = CliRunner().invoke(app, ["sweep", str(tmp_path)], env={"COLUMNS": "80"}).output
        assert rows_of(shown) == [
            "1 focal 0.05 completed 0.25 (best) 1 s",
            "0 balanced 0.05 completed 0.5 1 s",
        ]
        assert "job loss lr status val/nll time" in " ".join(shown.split())
        assert sweep_table.line(tmp_path, "now").endswith("best val/nll 0.25 (loss=focal, lr=0.05)")
        assert "swept: loss (2 values), optimizer.lr (1 value); 2 of 2 runs completed" in shown
        assert f"test that run: python train.py task=test run={tmp_path}/dir" in shown
        monkeypatch.chdir(tmp_path)  # where no train.py lies
        assert (
            sweep_table.summary(tmp_path)[-1] == "test that run: equiloss train task=test run=dir"
        )

    def test_a_directory_without_a_sweep_is_refused(self, tmp_path: Path) -> None:
        shown = CliRunner().invoke(app, ["sweep", str(tmp_path)])
        assert shown.exit_code == 1
        assert f"error: {tmp_path} holds no sweep" in shown.output


# Holds a part of the machine for a while, and says which and when.
OCCUPY = """
import json, os, sys, time
from pathlib import Path
from equiloss.launching import slots
from equiloss.config import TrainerConfig

with slots.share(Path(sys.argv[1]), TrainerConfig(), 2):
    began, mine = time.monotonic(), sorted(os.sched_getaffinity(0))
    time.sleep(0.5)
    print(json.dumps({"cores": mine, "from": began, "to": time.monotonic()}))
"""


class TestSlots:
    @pytest.mark.skipif(len(slots.cores()) < 2, reason="there is one core to share")
    def test_jobs_at_the_same_time_share_no_core(self, tmp_path: Path) -> None:
        jobs = [
            subprocess.Popen([sys.executable, "-c", OCCUPY, str(tmp_path)], stdout=subprocess.PIPE)
            for _ in range(4)
        ]
        notes = [json.loads(job.communicate(timeout=60)[0]) for job in jobs]
        for one in notes:
            assert len(one["cores"]) == len(slots.cores()) // 2
            for other in notes:
                together = one["from"] < other["to"] and other["from"] < one["to"]
                if one is not other and together:
                    assert not set(one["cores"]) & set(other["cores"])

    def test_alone_nothing_is_divided(self, tmp_path: Path) -> None:
        with slots.share(tmp_path, TrainerConfig(), 1) as variables:
            assert variables == {}
        assert list(tmp_path.iterdir()) == []

    def test_gpus_are_handed_out_once(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv(slots.VISIBLE, "3,5,7")
        config = TrainerConfig(accelerator="gpu", devices=2)
        with slots.share(tmp_path, config, 2) as variables:
            assert variables == {slots.VISIBLE: "3,5"}
        with (
            pytest.raises(ConfigError, match=r"trainer.devices=4, and 3 GPUs are visible"),
            slots.share(tmp_path, TrainerConfig(accelerator="gpu", devices=4), 2),
        ):
            pass

    @pytest.mark.parametrize(
        ("overrides", "jobs", "parallel"),
        [
            ([], 6, 1),
            (["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"], 6, 3),
            (["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"], 2, 2),
            (["hydra/launcher=joblib"], 99, len(slots.cores())),
            (["hydra/launcher=submitit_local"], 4, 4),
            (["hydra/launcher=submitit_slurm"], 4, 1),
        ],
    )
    def test_how_many_jobs_run_at_once(self, overrides, jobs: int, parallel: int) -> None:
        hydra = composed_with_hydra("sweep=losses", *overrides).hydra
        assert slots.parallel_jobs(hydra, jobs) == parallel


@pytest.mark.parametrize(
    "words",
    [pytest.param(TWO_BY_TWO, id="two"), pytest.param(THREE_BY_TWO, id="three", marks=slow)],
)
def test_losses_on_two_ranks(words: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    command = ("-m", *words)
    done = train(*command, timeout=240)
    assert done.returncode == 0, done.stderr
    (sweep_dir,) = (tmp_path / "runs").iterdir()
    found = results(sweep_dir)
    losses = ["cross_entropy", "log_softmax_nll", "softmax_nll"]
    if words is TWO_BY_TWO:
        losses = sorted(BOTH.removeprefix("loss=").split(","))
    assert [result.loss["name"] for result in found] == losses
    assert {result.world_size for result in found} == {2}
    assert {result.status for result in found} == {"completed"}
    # Names that a path in an override can hold.
    assert not any({"=", ","} & set(path.name) for path in sweep_dir.iterdir())
    assert f"{len(losses)} done, 0 running, 0 left" in done.stdout
    assert "verdict: match" in done.stdout
    # Again: nothing is left to do.
    done = train(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("completed already") == len(losses)
    assert results(sweep_dir) == found


AT_ONCE = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}


@slow
@pytest.mark.parametrize("launcher", AT_ONCE)
def test_launchers_that_run_jobs_at_once(launcher: str, train: Train, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    options = [*AT_ONCE[launcher], f"hydra.sweep.dir={directory}"]
    # Joblib's workers hang in a fork.
    done = train("-m", *TWO_BY_TWO, *options, timeout=240, anew=True)
    assert done.returncode == 0, done.stderr
    assert [result.world_size for result in results(directory)] == [2] * 2
    assert "verdict: match" in done.stdout
    assert "0 done, 0 running, 2 left" in done.stdout or launcher == "joblib"
    # Two jobs at once divide the cores between them, but a rank has one at least.
    threads = max(len(slots.cores()) // 2 // 2, 1)
    assert {result.environment["threads"] for result in results(directory)} == {threads}


@slow
@pytest.mark.parametrize("launcher", AT_ONCE)
def test_a_job_that_fails_beside_others(launcher: str, train: Train, tmp_path: Path) -> None:
    bad = "loss.label_smoothing=0.1,2"  # out of its range: the second job fails
    directory = tmp_path / "sweep"
    options = [*AT_ONCE[launcher], f"hydra.sweep.dir={directory}"]
    # Joblib's workers hang in a fork.
    done = train("-m", *options, *FAST, bad, timeout=240, anew=True)
    assert done.returncode == 1
    assert "label_smoothing" in done.stderr.splitlines()[-1]
    assert sorted(result.status for result in results(directory)) == ["completed", "failed"]


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        check=False,
    )


@slow  # of a single run: tests/faults
def test_torchrun_runs_a_sweep(tmp_path: Path) -> None:
    done = torchrun("-m", *TWO_BY_TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep_dir,) = (tmp_path / "runs").iterdir()
    assert [result.world_size for result in results(sweep_dir)] == [2] * 2
    assert done.stdout.count("2 done, 0 running, 0 left") == 1
    assert "verdict: match" in done.stdout


@slow
def test_torchrun_with_another_number_of_devices_is_refused(tmp_path: Path) -> None:
    done = torchrun(*FAST, "trainer.devices=3", cwd=tmp_path)
    assert done.returncode != 0
    assert "torchrun started 2 ranks, and trainer.devices is 3" in done.stderr


def srun(*arguments: str, cwd: Path, differ: bool = False) -> list[tuple[int, str]]:
    """What srun does, with its variables: two tasks of one step."""
    tasks = [
        subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", *arguments),
                f"seed={rank if differ else 0}",
            ],
            env={
                **os.environ,
                "PYTHONPATH": PYTHONPATH,
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    return [(task.returncode, output) for task, output in zip(tasks, outputs, strict=True)]


@slow  # ranks from outside: none in the suite train together
def test_srun_starts_the_ranks(tmp_path: Path) -> None:
    ended = srun(*FAST, cwd=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    (run_dir,) = (tmp_path / "runs" / "fit").iterdir()
    assert Result.read(run_dir).world_size == 2
    assert ended[1][1] == ""  # the first rank speaks for both


def test_ranks_that_composed_different_configurations_never_train(tmp_path: Path) -> None:
    ended = srun(*FAST, cwd=tmp_path, differ=True)
    for code, output in ended:
        assert code == 1
        assert "error: rank 1 composed another configuration than rank 0" in output
    assert list(tmp_path.rglob("metrics.csv")) == []


def test_an_allocation_of_slurm_alone_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert membership.external.__wrapped__() is None


@slow
def test_a_search_without_a_seed_gives_ranks_one_configuration(
    train: Train, tmp_path: Path
) -> None:
    done = train(
        "-m",
        "sweep=optuna_lr",
        "hydra.sweeper.sampler.seed=null",
        "hydra.sweeper.n_trials=2",
        "trainer=ddp_cpu",
        *FAST,
        f"hydra.sweep.dir={tmp_path}/sweep",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "this sweep cannot be resumed" in done.stderr
    found = results(tmp_path / "sweep")
    assert [result.world_size for result in found] == [2, 2]
    assert len({result.config_hash for result in found}) == 2


@slow
def test_a_failed_trial_does_not_end_a_study(train: Train, tmp_path: Path) -> None:
    done = train(
        "-m",
        "sweep=optuna_lr",
        "hydra.sweeper.n_trials=3",
        # Out of its range in some trials, and not in others.
        "loss.label_smoothing=choice(0.1,2)",
        "hydra.sweeper.sampler.seed=2",
        *FAST,
        f"hydra.sweep.dir={tmp_path}/sweep",
        timeout=240,
    )
    assert done.returncode == 1
    ledger = Ledger(tmp_path / "sweep")
    attempt = ledger.attempt()
    assert attempt is not None
    ended = [entry.status for entry in ledger.newest(attempt.attempt).values()]
    assert len(ended) == 3
    assert {"failed", "completed"} == set(ended)


@slow  # `make faults` kills sweeps too
@pytest.mark.parametrize("kills", [(14,), (5, 9, 15)], ids=["in the second job", "three times"])
def test_a_sweep_that_is_killed_goes_on(kills: tuple[int, ...], tmp_path: Path) -> None:
    """Killed after so many rows of metrics, in whatever it does then."""
    for rows in kills:
        killed = start_sweep(tmp_path / "sweep")
        until_rows(tmp_path / "sweep", rows)
        time.sleep(random.Random(rows).uniform(0, 0.4))
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert sum(result.status == "completed" for result in results(tmp_path / "sweep")) < 2
    again = start_sweep(tmp_path / "sweep")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    for result, path in zip(
        results(tmp_path / "sweep"), sorted((tmp_path / "sweep").glob("*-s0-*")), strict=True
    ):
        assert result.status == "completed"
        whole = tmp_path / result.loss["name"]
        uninterrupted = run(composed(*SLOW_STEPS, f"loss={result.loss['name']}"), whole)
        assert set(bits(path, whole).values()) == {0}
        lines = (path.parent / "ledger.jsonl").read_text().splitlines()
        ended = [line for line in map(json.loads, lines) if line.get("directory") == path.name]
        trained = [line for line in ended if line["status"] == "completed" and not line["skipped"]]
        assert len(trained) == 1
        del result.metrics["train/samples_per_s"], uninterrupted.metrics["train/samples_per_s"]
        assert result.metrics == uninterrupted.metrics


@slow  # of a single run: tests/launching/test_resume.py
def test_a_second_process_on_a_sweep_is_refused_or_waits(tmp_path: Path) -> None:
    # Long enough for the others to come while it is at work.
    first = start_sweep(tmp_path / "sweep", "trainer.max_steps=30")
    until_rows(tmp_path / "sweep", 2)
    second = start_sweep(tmp_path / "sweep", "trainer.max_steps=30")
    waiting = start_sweep(tmp_path / "sweep", "trainer.max_steps=30", "in_use=wait")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"error: {tmp_path}/sweep is in use by process {first.pid} on" in output
    assert "Traceback" not in output
    assert first.communicate(timeout=90)[0].count("completed") > 0
    assert first.returncode == 0
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, output
    assert output.count("completed already") == 2
