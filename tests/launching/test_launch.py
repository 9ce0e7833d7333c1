"""The command line: one clear line for a mistake, jobs that fail alone, and an honest exit code."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equiloss.launching import ranks
from equiloss.records.ledger import Ledger
from equiloss.records.results import Result
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from processes import children, start, until_it_trains
from support import ROOT, Train, composed, slow

FAST = ("debug=fast", "callbacks=quiet", "model.options.widths=[8,16]", "logger=csv")
CUSTOM = ("model=custom", "callbacks=quiet", "logger=csv", "trainer.max_steps=30")

# What a user may get wrong, and words that the one line about it must hold.
MISTAKES = [
    ("loss=cros_entropy", ["'cros_entropy'", "Did you mean 'cross_entropy'?", "softmax_nll"]),
    ("loss.gamma=2", ["'gamma'", "label_smoothing"]),
    ("loss.label_smoothing=high", ["loss.label_smoothing", "'high'", "Float"]),
    ("loss.label_smoothing=1.5", ["loss.label_smoothing", "[0, 1]", "1.5"]),
    ("loss.label_smoothing=-0.1", ["loss.label_smoothing", "[0, 1]", "-0.1"]),
    ("loss.weight=[1,2]", ["loss.weight", "2 values", "10 classes"]),
    ("loss.weight=heavy", ["loss.weight", "balanced", "'heavy'"]),
    ("loss=custom", ["missing value", "loss.target (such as loss.target=torch.nn:Cross"]),
    ("loss.name=focal", ["loss.name=focal", "give loss=focal"]),
    ("data.root=~/pics", ["data.root=~/pics: a value with ~", "'data.root=\"~/pics\"'"]),
    ("data.root=/a=b", ["'data.root=\"/a=b\"'"]),
    ("data.root=/bïlder", ["'data.root=\"/bïlder\"'"]),
    ("bläh=3", ["bläh=3", "the key, too"]),
    ("optimizer.name=Adam", ["no option momentum, nesterov", "~optimizer.options.momentum"]),
    ("scheduler.name=StepLR", ["give scheduler=constant scheduler.name=StepLR"]),
    ("scheduler.name=ReduceLROnPlateau", ["is refused", "callbacks=early_stopping"]),
    ("init_from=/nowhere.ckpt", ["no checkpoint at /nowhere.ckpt"]),
    ("+callbacks.items.a=3", ["callbacks.items.a needs a target"]),
    ("+callbacks.items.a.target=os:no", ["error: callbacks.items.a.target=os:no cannot"]),
    ("init_from={folder}", ["no checkpoint at {folder}: name a file in it"]),
    ("data=digit", ["'digit'", "Did you mean 'digits'?"]),
    ("data=fashion_mnist data.root=/nowhere", ["/nowhere", "data.root", "data.download=true"]),
    ("data=image_folder data.root={folder}", ["{folder}/cats", "holds no image"]),
    ("data.batch_size=0", ["data.batch_size", "positive", "0"]),
    ("data.batch_size=few", ["data.batch_size", "'few'", "Integer"]),
    (
        "data=custom data.target=stand_ins:bad_label model.options.widths=[8]",
        ["train target 7 is -1", "[0, 2]"],
    ),
    (
        "data=custom data.target=stand_ins:soft_targets data.options={{total:0.9}}",
        ["train target 0 sums to 0.9"],
    ),
    (
        "model=custom model.target=stand_ins:too_many_logits",
        ["'custom'", "[11] logits", "10 classes"],
    ),
    ("model=torchvision model.name=resnet19", ["'resnet19'", "Did you mean 'resnet18'?"]),
    ("model=custom model.target=stand_ins:nothing", ["stand_ins:nothing", "cannot be imported"]),
    ("trainer.gradient_clip_val=1", ["gradient_clip_val", "optimizer.gradient_clip_norm"]),
    ("+trainer.gradient_clip_val=1", ["gradient_clip_val", "optimizer.gradient_clip_norm"]),
    ("+trainer.accumulate_grad_batches=2", ["accumulate_grad_batches", "micro_batch_size"]),
    ("+trainer.nothing=1", ["'nothing'", "Lightning's Trainer"]),
    ("trainer.device=2", ["'device'", "Did you mean 'devices'?"]),
    ("trainer.precision=16-mixed", ["16-mixed", "GPU", "bf16-mixed"]),
    ("trainer.precision=32", ["'32'", "32-true"]),
    (
        "+callbacks.items.ga.target=lightning.pytorch.callbacks:GradientAccumulationScheduler "
        "+callbacks.items.ga.scheduling={{0:2}}",
        ["callbacks.items.ga: GradientAccumulationScheduler is refused", "micro_batch_size"],
    ),
    ("trainer.accelerator=abacus", ["trainer.accelerator=abacus"]),
    ("trainer.accelerator=tpu", ["trainer.accelerator=tpu is refused", "cpu, gpu or auto"]),
    ("+trainer.profiler=foo", ["+trainer.profiler=foo is refused", "'simple', 'advanced'"]),
    ("+trainer.arguments.max_time=[null]", ["+trainer.max_time=[None] is refused"]),
    ("+trainer.max_time=soon", ["trainer.max_time", "DD:HH:MM:SS", "soon"]),
    ("logger=wandb", ["logger=wandb", "not installed", "pip install wandb"]),
    (
        "model=torchvision trainer.reduction=bitwise data=synthetic data.options.size=32",
        ["trainer.reduction=bitwise", "model=resnet18", "bn1 (BatchNorm2d)"],
    ),
    ("optimizer.name=sgdw", ["'sgdw'", "Did you mean 'SGD'?"]),
    ("scheduler.name=cosin", ["'cosin'", "Did you mean 'cosine'?"]),
    ("checkpoint.monitor=val/accuracy", ["'val/accuracy'", "val/acc"]),
    ("task=test", ["ckpt_path", "task=test"]),
    ("resume=maybe", ["resume", "'maybe'", "auto, never"]),
    ("in_use=ignore", ["in_use", "'ignore'", "refuse, wait, unlocked"]),
    ("task=test ckpt_path=/nowhere.ckpt", ["no checkpoint at /nowhere.ckpt"]),
    ("hydra.run.dir=/dev/null/run", ["cannot use /dev/null/run: not a directory", "hydra.run.dir"]),
    ("-m hydra.sweep.dir=/dev/null", ["cannot use /dev/null: file exists", "hydra.sweep.dir"]),
    ("parity.formulations=[cross_entropi]", ["'cross_entropi'", "Did you mean 'cross_entropy'?"]),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    mistake: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, which spares some thirty imports of torch."""
    folder = tmp_path / "folder"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    overrides = mistake.format(folder=folder).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides, "progress_bar=false"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    # A text as the exit code is printed to stderr, and the code is 1.
    line = stopped.value.code if isinstance(stopped.value.code, str) else last_line(capsys)
    assert stopped.value.code not in (0, None)
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word.format(folder=folder) in line


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_mistake_ends_the_process_without_a_traceback(train: Train) -> None:
    for mistake in ("loss=cros_entropy", "loss.weight=[1,2]"):
        done = train(mistake, "callbacks=quiet")
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_traceback_is_there_for_who_asks(train: Train) -> None:
    done = train("data.batch_size=0", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_modules_are_found_where_the_user_stands(train: Train, tmp_path: Path) -> None:
    """Python itself looks beside train.py alone."""
    (tmp_path / "mine_alone.py").write_text(
        "def plain(logits, target):\n"
        "    return logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0]\n"
    )
    done = train(*FAST, "loss=custom", "loss.target=mine_alone:plain", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert Result.read(tmp_path / "run").loss["name"] == "custom"


@slow  # of a claim in this process: tests/launching/test_resume.py
def test_a_directory_that_holds_a_run_is_left_alone(train: Train, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(*FAST, f"hydra.run.dir={directory}").returncode == 0
    before = {
        file: file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.suffix != ".log"
    }
    done = train(*FAST, "seed=1", f"hydra.run.dir={directory}")
    assert done.returncode == 1
    assert f"{directory} already holds a completed run of another" in done.stderr
    assert "(seed was 0 and is 1)" in done.stderr
    assert before
    assert all(file.read_bytes() == content for file, content in before.items())


@slow  # of a claim in this process: tests/launching/test_resume.py
def test_a_run_that_failed_before_it_began_may_be_repeated(train: Train, tmp_path: Path) -> None:
    directory = f"hydra.run.dir={tmp_path}/run"
    assert train(*FAST, directory, "loss.weight=[1]").returncode == 1
    assert Result.read(tmp_path / "run").status == "failed"
    assert train(*FAST, directory).returncode == 0
    assert Result.read(tmp_path / "run").status == "completed"


def started(directory: Path, target: str, devices: int) -> subprocess.Popen[str]:
    """Start `train.py`, and wait until it trains."""
    options = (f"model.target=stand_ins:{target}", f"trainer.devices={devices}")
    process = start(directory, "logger=tensorboard", *options)
    until_it_trains(process, directory, rows=2)
    return process


@pytest.mark.parametrize(
    ("sent", "number", "devices"),
    [
        ("to one rank", signal.SIGTERM, 2),
        *(
            pytest.param(*arrangement, marks=slow)
            for arrangement in (
                *(("by a terminal", signal.SIGINT, devices) for devices in (1, 2)),
                *(("to the process", signal.SIGTERM, devices) for devices in (1, 2)),
                *(("to the process", signal.SIGUSR1, devices) for devices in (1, 2)),
                *(("to the process", signal.SIGHUP, devices) for devices in (1, 2)),
                ("to one rank", signal.SIGUSR1, 2),
            )
        ),
    ],
)
def test_a_signal_ends_a_run_after_the_step(
    sent: str, number: signal.Signals, devices: int, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    process = started(directory, "slow", devices)
    if sent == "by a terminal":
        # To every process of the group.
        os.killpg(process.pid, number)
    elif sent == "to one rank":
        os.kill(children(process.pid)[-1], number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    result = Result.read(directory)
    assert result.status == "interrupted"
    assert result.error == f"interrupted by {number.name}"
    (state,) = (directory / "checkpoints").glob("last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(state)["global_step"] == result.steps["taken"] >= 2
    assert f"interrupted by {number.name} after {result.steps['taken']} steps: the same" in output


@slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_signal_ends_it_at_once(devices: int, tmp_path: Path) -> None:
    """The step under way sleeps for a minute: nobody waits for it."""
    process = started(tmp_path / "run", "sleeps", devices)
    rank = children(process.pid)[-1] if devices > 1 else None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    if rank is not None:
        assert not Path(f"/proc/{rank}").exists()


@pytest.mark.parametrize(
    ("way", "devices"),
    [
        ("os._exit", 1),
        *(pytest.param(*case, marks=slow) for case in (("sys.exit", 1), ("sys.exit", 2))),
        pytest.param("os._exit", 2, marks=slow),
    ],
)
def test_a_run_without_its_results_is_no_success(
    way: str, devices: int, train: Train, tmp_path: Path
) -> None:
    done = train(
        *CUSTOM,
        "model.target=stand_ins:leaves",
        f"model.options={{way:{way}}}",
        f"trainer.devices={devices}",
        f"hydra.run.dir={tmp_path}/run",
    )
    assert done.returncode == 1
    assert Result.read(tmp_path / "run").status == "failed"
    assert done.stderr.startswith("error: ")
    if (way, devices) != ("os._exit", 2):
        assert way in done.stderr


# Where a rank of a job trips, which one, and what the job's error then says.
BEFORE_JOINING = ("raises_before_joining", 1, "rank 1: RuntimeError: this rank never joins")
IN_TRAINING = ("raises_in_training", 1, "rank 1: RuntimeError: this rank tripped")
FIRST_KILLED = ("killed", 0, "rank 0 was killed by SIGKILL")
SECOND_KILLED = ("killed", 1, "rank 1 was killed by SIGKILL")
TWO_JOBS = "trainer.devices=1,2"
FOUR_JOBS = "trainer.devices=2 model.options.rank=7,{rank},8,9"


@slow  # of a single run: make faults
@pytest.mark.parametrize(
    ("target", "rank", "cause", "swept"),
    [
        (*way, jobs)
        for jobs, ways in {
            TWO_JOBS: (BEFORE_JOINING,),
            FOUR_JOBS: (BEFORE_JOINING, FIRST_KILLED, SECOND_KILLED, IN_TRAINING),
        }.items()
        for way in ways
    ],
)
def test_a_job_whose_rank_dies_fails_alone_and_is_retried(
    target: str, rank: int, cause: str, swept: str, train: Train, tmp_path: Path
) -> None:
    """Job 1 loses a rank; the others have no rank of that number, or are one process."""
    mended = tmp_path / "mended"
    command = (
        "-m",
        *CUSTOM,
        f"model.target=stand_ins:{target}",
        f"model.options={{rank:{rank},unless:{mended}}}",
        *swept.format(rank=rank).split(),
        f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.sweep.subdir=${hydra:job.num}",
    )
    done = train(*command)
    assert done.returncode == 1
    assert f"error: job 1: {cause}" in done.stderr
    jobs = len(list((tmp_path / "sweep").glob("*/results.json")))
    results = [Result.read(tmp_path / "sweep" / str(job)) for job in range(jobs)]
    failed = results.pop(1)
    assert failed.status == "failed"
    assert failed.error.startswith(cause)
    assert [result.status for result in results] == ["completed"] * (jobs - 1)
    assert (tmp_path / "sweep" / "1" / "error.txt").exists()
    # A process group would wait for its 30 minutes.
    ledger = Ledger(tmp_path / "sweep")
    attempt = ledger.attempt()
    assert attempt is not None
    reported = ledger.newest(attempt.attempt)[1].time
    waited = reported - (tmp_path / "mended.tripped").stat().st_mtime
    print(f"{target} {rank}: reported after {waited:.1f} s")
    assert 0 <= waited < 15

    # The same command again retries the one, and leaves the others alone.
    mended.touch()
    done = train(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("completed already") == jobs - 1
    again = [Result.read(tmp_path / "sweep" / str(job)) for job in range(jobs)]
    retried = again.pop(1)
    assert retried.status == "completed"
    assert retried.world_size == 2
    assert again == results
    assert not (tmp_path / "sweep" / "1" / "error.txt").exists()


def test_a_failed_rank_ends_its_job_within_seconds(train: Train, tmp_path: Path) -> None:
    done = train(
        *CUSTOM,
        "model.target=stand_ins:killed",
        "model.options={rank: 1}",
        "trainer.devices=2",
        f"hydra.run.dir={tmp_path}/run",
    )
    reported = (tmp_path / "run" / "results.json").stat().st_mtime
    last_step = (tmp_path / "run" / "metrics.csv").stat().st_mtime
    assert done.returncode == 1
    # A process group would wait for its 30 minutes. Half a second of grace, and the writing.
    assert reported - last_step < 15


@slow  # in the suite: a sweep of groups of 2
def test_a_multirun_over_devices_has_real_groups_of_each_size(train: Train, tmp_path: Path) -> None:
    done = train(
        "-m",
        *FAST,
        "trainer=ddp_cpu",
        "seed=1,2",
        "trainer.devices=1,2",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.sweep.subdir=${hydra:job.num}",
    )
    assert done.returncode == 0, done.stderr
    results = [Result.read(tmp_path / "sweep" / str(job)) for job in range(4)]
    assert [result.world_size for result in results] == [1, 2, 1, 2]
    assert all(result.status == "completed" for result in results)
    assert len({result.config_hash for result in results}) == 4


@slow
def test_ranks_may_have_loader_workers(train: Train, tmp_path: Path) -> None:
    done = train(
        *FAST,
        "trainer=ddp_cpu",
        "data.num_workers=2",
        f"hydra.run.dir={tmp_path}/run",
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert Result.read(tmp_path / "run").world_size == 2


def test_a_process_that_supervises_does_without_lightning() -> None:
    """Importing it takes seconds, in each process."""
    modules = "launching.launch, launching.command, launching.console, report.page"
    imports = "; ".join(f"import equiloss.{name}" for name in modules.split(", "))
    subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; assert 'lightning' not in sys.modules"],
        check=True,
    )


def test_ranks_have_an_environment_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's is left alone; its number of threads is not theirs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "3")  # which torch would prefer
    resolved = composed("trainer=ddp_cpu", "trainer.threads=1")
    (tmp_path / "config.yaml").write_text(resolved.text)
    before = dict(os.environ)
    ranks.supervise(tmp_path, "stand_ins:notes_its_surroundings", 2, resolved.config.trainer)
    assert dict(os.environ) == before
    for rank in range(2):
        noted = json.loads((tmp_path / f"noted{rank}.json").read_text())
        # Rank and number of ranks, what its own children get, and what torch uses itself.
        variables = {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        assert noted == {**variables, "threads": 1}


# A signal comes while what a run has done is printed.
LATE = """
import os, runpy, signal, sys, time
from equiloss.launching import console

def show(*_):
    open("shown", "x").close()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

console.show = show
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@slow
def test_a_signal_after_the_end_makes_nothing_of_a_run_undone(tmp_path: Path) -> None:
    words = (*FAST, f"hydra.run.dir={tmp_path}/run")
    command = [sys.executable, "-c", LATE, str(ROOT / "train.py"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shown").exists()  # so that a signal was sent
    assert Result.read(tmp_path / "run").status == "completed"
