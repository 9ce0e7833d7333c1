"""A run that was stopped anywhere and goes on is the run that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equiloss import randomness
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import UserError
from equiloss.invariance.interruption import bits
from equiloss.records.results import Result, read_metrics
from equiloss.records.run_dir import METRICS
from equiloss.run import run
from processes import SLOW, children, start, until_it_trains
from stops import StopBefore, StopError
from support import Train, composed, slow

# 38 training rows in batches of 9: five steps an epoch, the last one of 2 rows. The network
# draws from every random generator.
SMALL = (
    "callbacks=quiet",
    "logger=csv",
    "data=synthetic",
    "data.options={num_samples: 60}",
    "data.batch_size=9",
    "data.augment.shift=1",
    "model=custom",
    "model.target=stand_ins:noisy",
    "trainer.max_epochs=3",
    "checkpoint.every_n_steps=1",
    "parity.every_n_steps=4",
)
STEPS = 15


class StopBeforeTest(Callback):
    """Raises when everything but the test is done."""

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        raise StopError


class StopBeforeValidation(Callback):
    """Raises between an epoch's last step and its validation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise StopError


class StopAfterValidation(StopBeforeValidation):
    """Raises between an epoch's validation and the checkpoint after it."""

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise StopError


class SignalAt(Callback):
    """Sends this process a signal in a hook, once the run has taken so many steps."""

    def __init__(self, hook: str, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.steps, self.number = steps, number
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            os.kill(os.getpid(), self.number)


def stopped_and_continued(directory: Path, stop: Callback, *overrides: str) -> Result:
    with pytest.raises(StopError):
        run(composed(*SMALL, *overrides), directory, callbacks=[stop])
    return run(composed(*SMALL, *overrides), directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    assert run(composed(*SMALL), directory).steps["taken"] == STEPS
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.raises(StopError):
        run(composed(*SMALL), directory, callbacks=[StopBefore(7)])
    return directory


def assert_same(directory: Path, reference: Path) -> None:
    assert set(bits(directory, reference).values()) == {0}
    ours, theirs = (Result.read(place) for place in (directory, reference))
    for result in (ours, theirs):
        del result.metrics["train/samples_per_s"]
    for part in ("status", "metrics", "parity", "samples", "steps", "loss", "config_hash"):
        assert getattr(ours, part) == getattr(theirs, part), part


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[slow] * (step % 2)) for step in range(1, STEPS)]
)
def test_from_any_step(step: int, whole: Path, tmp_path: Path) -> None:
    result = stopped_and_continued(tmp_path, StopBefore(step))
    assert_same(tmp_path, whole)
    assert [segment["from_step"] for segment in result.segments] == [0, step]


@pytest.mark.parametrize(
    "stop",
    [
        StopBeforeTest(),
        StopBeforeValidation(0),
        StopBeforeValidation(2),
        StopAfterValidation(1),
        StopAfterValidation(2),
    ],
    ids=lambda stop: f"{type(stop).__name__}-{getattr(stop, 'epoch', '')}",
)
def test_around_the_evaluations(stop: Callback, whole: Path, tmp_path: Path) -> None:
    stopped_and_continued(tmp_path, stop)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("hook", "steps", "number", "goes_on_at"),
    [
        # The step under way ends; an epoch's last one ends with its validation.
        ("on_train_batch_start", 2, signal.SIGTERM, 3),
        ("on_train_batch_start", 4, signal.SIGINT, 5),
        ("on_train_batch_end", 7, signal.SIGUSR1, 7),
        ("on_validation_batch_start", 10, signal.SIGHUP, 10),
        ("on_train_epoch_end", 15, signal.SIGTERM, 15),
        ("on_test_batch_start", 15, signal.SIGTERM, 15),
    ],
)
def test_after_a_signal(
    hook: str, steps: int, number: signal.Signals, goes_on_at: int, whole: Path, tmp_path: Path
) -> None:
    # A shell may have started these tests in its background, or under nohup.
    before = signal.signal(number, signal.SIG_DFL)
    sparse = composed(*SMALL, "checkpoint.every_n_steps=100")  # the signal has one of its own
    with pytest.raises(Interrupted) as caught:
        run(sparse, tmp_path, callbacks=[SignalAt(hook, steps, number)])
    assert caught.value.code == 128 + number
    assert signal.signal(number, before) == signal.SIG_DFL
    stopped = Result.read(tmp_path)
    assert stopped.status == "interrupted"
    assert stopped.error == f"interrupted by {number.name}"
    assert stopped.steps["taken"] == goes_on_at
    result = run(composed(*SMALL), tmp_path)
    begun = [segment["from_step"] for segment in result.segments]
    assert begun == [0, goes_on_at][: 1 + (goes_on_at < STEPS)]
    assert_same(tmp_path, whole)


def test_a_limit_of_time_interrupts(whole: Path, tmp_path: Path) -> None:
    """Each attempt takes a step, whatever the limit, and the last one tests."""
    limited = composed(*SMALL, "trainer.max_time=00:00:00:00")
    for steps in (1, 2):
        with pytest.raises(Interrupted, match=r"trainer\.max_time") as caught:
            run(limited, tmp_path)
        assert caught.value.code == 124
        assert Result.read(tmp_path).steps["taken"] == steps
        (tmp_path / "results.json").unlink()  # a claim of the directory would do it
    run(composed(*SMALL), tmp_path)
    assert_same(tmp_path, whole)


def test_validation_inside_an_epoch(tmp_path: Path) -> None:
    """A step may be saved, validated and the run's last at once: early stopping counts each."""
    options = (
        "+trainer.val_check_interval=2",
        "checkpoint.every_n_steps=2",
        "early_stopping.enabled=true",
        "early_stopping.patience=3",
        "early_stopping.min_delta=10",
    )
    # Validated after steps 2, 4, 7 and 9 of 15; the fourth is the third without improvement.
    whole = run(composed(*SMALL, *options), tmp_path / "whole")
    assert whole.steps["taken"] == 9
    stopped_and_continued(tmp_path / "stopped", StopBefore(3), *options)
    asked = SignalAt("on_train_batch_start", 3)
    with pytest.raises(Interrupted):
        run(composed(*SMALL, *options), tmp_path / "interrupted", callbacks=[asked])
    run(composed(*SMALL, *options), tmp_path / "interrupted")
    for way in ("stopped", "interrupted"):
        assert_same(tmp_path / way, tmp_path / "whole")


def test_twice(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(composed(*SMALL), tmp_path, callbacks=[StopBefore(3)])
    result = stopped_and_continued(tmp_path, StopBefore(11))
    assert_same(tmp_path, whole)
    assert [segment["from_step"] for segment in result.segments] == [0, 3, 11]


def test_from_an_older_checkpoint(whole: Path, tmp_path: Path) -> None:
    """What was logged after it is logged again, and stands there once."""
    sparse = composed(*SMALL, "checkpoint.every_n_steps=3")
    with pytest.raises(StopError):
        run(sparse, tmp_path, callbacks=[StopBefore(8)])
    result = run(composed(*SMALL), tmp_path)
    assert [segment["from_step"] for segment in result.segments] == [0, 6]
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("schedule", ["scheduler=one_cycle", "scheduler=constant"])
def test_optimizers_and_schedules(schedule: str, tmp_path: Path) -> None:
    options = (schedule, "optimizer=adamw", "trainer.precision=64-true")
    run(composed(*SMALL, *options), tmp_path / "whole")
    stopped_and_continued(tmp_path / "cut", StopBefore(7), *options)
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_max_steps_inside_an_epoch(tmp_path: Path) -> None:
    options = ("trainer.max_steps=8",)
    run(composed(*SMALL, *options), tmp_path / "whole")
    stopped_and_continued(tmp_path / "cut", StopBeforeTest(), *options)
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_what_early_stopping_had_ended_stays_ended(tmp_path: Path) -> None:
    options = (
        "early_stopping.enabled=true",
        "early_stopping.patience=1",
        "early_stopping.min_delta=10",
    )
    assert run(composed(*SMALL, *options), tmp_path / "whole").steps["taken"] == 10
    stopped_and_continued(tmp_path / "cut", StopBeforeTest(), *options)
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_the_comparison_notices_a_generator_that_was_not_put_back(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "restore", lambda *_: None)
    stopped_and_continued(tmp_path, StopBefore(7))
    found = bits(tmp_path, whole)
    assert found["weights"] > 0
    assert found["generators"] > 0
    assert found["metrics.csv"] > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_size=8", "batch_size is 8 now and was 9"),
        ("data.options={num_samples: 70}", "the length of the train split is 46 now and was 38"),
        ("data.max_samples=4", "the length of the train split is 4 now and was 38"),
        ("data.options={num_samples: 60, num_classes: 3}", "the number of classes is 3 now"),
        (
            "data.options={num_samples: 60, seed: 1}",
            r"class 0 \(0\) of the train split is 3 images \(digest .*\) now and was 3 images",
        ),
        ("loss=softmax_nll", "the loss is softmax_nll now and was cross_entropy"),
        ("loss.label_smoothing=0.1", r"loss.label_smoothing is 0.1 now and was 0.0"),
        ("seed=1", "seed is 1 now and was 0"),
    ],
)
def test_other_data_and_other_losses_are_refused(
    override: str, words: str, stopped: Path, tmp_path: Path
) -> None:
    """By the checkpoint itself: the data may change behind the same configuration."""
    directory = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match=words) as caught:
        run(composed(*SMALL, override), directory)
    assert "cannot" in str(caught.value)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


class TestDamage:
    """A run that was stopped before step 7 finds its files damaged."""

    @pytest.fixture
    def directory(self, stopped: Path, tmp_path: Path) -> Path:
        return shutil.copytree(stopped, tmp_path / "run")

    def continued(self, directory: Path) -> int:
        """Go on to the end; returns the step from which on."""
        return run(composed(*SMALL), directory).segments[-1]["from_step"]

    @pytest.mark.parametrize("damage", [Path.unlink, flipped])
    def test_of_the_last_state_the_one_before_goes_on(self, damage, directory, whole, caplog):
        damage(directory / "checkpoints" / "last.ckpt")
        (directory / "checkpoints" / "index.json").unlink()
        assert self.continued(directory) == 6
        assert_same(directory, whole)
        if damage is not Path.unlink:
            assert "last.ckpt is damaged: it is last.ckpt.damaged now" in caplog.text
            assert (directory / "checkpoints" / "last.ckpt.damaged").exists()

    def test_of_every_state_the_run_starts_anew(self, directory, whole, caplog):
        for name in ("last.ckpt", "previous.ckpt"):
            flipped(directory / "checkpoints" / name)
        assert self.continued(directory) == 0
        assert "the run starts anew" in caplog.text
        assert_same(directory, whole)

    @pytest.mark.parametrize("damage", [Path.unlink, flipped])
    def test_of_the_best_weights_it_tests_the_best_after(self, damage, directory, whole):
        """Validation improves in each epoch, so that the best is found again."""
        damage(directory / "checkpoints" / "best.ckpt")
        assert self.continued(directory) == 7
        assert_same(directory, whole)

    def test_of_the_best_weights_at_the_end_it_tests_the_last(self, directory):
        result = stopped_and_continued(directory, StopBeforeTest(), "test_weights=last")
        last = result.metrics["test/nll"]
        flipped(directory / "checkpoints" / "best.ckpt")
        result = run(composed(*SMALL), directory)
        assert result.metrics["test/nll"] == last
        (note,) = Result.read(directory).notes
        assert note.endswith("best.ckpt is gone: the last weights were tested")

    @pytest.mark.parametrize("damage", [Path.unlink, emptied, halved])
    def test_of_metrics_csv_the_rows_that_are_whole_stay(self, damage, directory, whole, caplog):
        damage(directory / METRICS)
        assert self.continued(directory) == 7
        assert "metrics.csv has lost" in caplog.text
        found = bits(directory, whole)
        assert found.pop("metrics.csv") > 0
        assert set(found.values()) == {0}
        assert read_metrics(directory, "train/loss")[-8:] == read_metrics(whole, "train/loss")[-8:]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    options = ("checkpoint.every_n_steps=3", "logger=tensorboard")
    stopped_and_continued(tmp_path, StopBefore(9), *options)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))
    assert [event.step for event in events.Scalars("val/nll")] == [4, 9, 14]


def killed(directory: Path, devices: int, victim: str) -> None:
    """Start `train.py` and SIGKILL one of its processes in its fifth step or later."""
    process = start(directory, f"trainer.devices={devices}")
    until_it_trains(process, directory)
    if victim == "a rank":
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
        assert Result.read(directory).status == "failed"
    else:
        process.kill()
        process.communicate(timeout=60)
    assert len(read_metrics(directory, "train/loss")) < 12


@pytest.mark.parametrize(
    ("devices", "victim", "continued_on"),
    [
        pytest.param(1, "train.py", 1, marks=slow),
        pytest.param(2, "train.py", 2, marks=slow),
        pytest.param(2, "a rank", 1, marks=slow),  # `make faults` does so by the dozen
    ],
)
def test_the_same_command_continues_what_was_killed(
    devices: int, victim: str, continued_on: int, train: Train, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    killed(directory, devices, victim)
    arguments = (*SLOW, f"hydra.run.dir={directory}")
    done = train(*arguments, f"trainer.devices={continued_on}")
    assert done.returncode == 0, done.stderr
    result = Result.read(directory)
    assert result.status == "completed"
    assert [segment["world_size"] for segment in result.segments] == [devices, continued_on]
    resumed_at = result.segments[1]["from_step"]
    assert 4 <= resumed_at < 12
    assert resumed_at % 2 == 0
    assert len(read_metrics(directory, "train/loss")) == 12

    if devices == 1:
        whole = tmp_path / "whole"
        run(composed(*SLOW), whole)
        assert set(bits(directory, whole).values()) == {0}
        # Once more: there is nothing left to do, and the stored result is shown.
        again = train(*arguments)
        assert again.returncode == 0
        assert "completed already" in again.stdout
        assert Result.read(directory) == result
