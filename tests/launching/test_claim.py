"""Run directories: one process at a time, and only the run that is in them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from equiloss.errors import ConfigError
from equiloss.launching.claim import MAY_CHANGE, changes, claim
from equiloss.records.results import Result
from equiloss.records.run_dir import CONFIG, LOCK, METRICS, RESULTS, TRACKERS
from support import composed


def results(status: str) -> Result:
    return Result(status, "0" * 64, {"name": "cross_entropy", "options": {}})


def began(directory: Path, *overrides: str, checkpoint: bool = True) -> None:
    """What a run leaves that was killed."""
    with claim(directory, composed(*overrides)):
        (directory / METRICS).write_text("step\n0\n")
        (directory / "events.out.tfevents.1").write_text("")
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / "index.json").write_text("{}")
        if checkpoint:
            (directory / "checkpoints" / "last.ckpt").write_text("")


def content(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_an_empty_directory_gets_the_configuration(tmp_path: Path) -> None:
    with claim(tmp_path / "run", composed("seed=3")) as todo:
        assert todo
    assert "seed: 3" in (tmp_path / "run" / CONFIG).read_text()


def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    began(tmp_path)
    results("interrupted").write(tmp_path)
    (tmp_path / "error.txt").write_text("")
    (tmp_path / TRACKERS).write_text("{}")
    changed = ("trainer.devices=2", "data.num_workers=1", "logger=wandb")
    with claim(tmp_path, composed(*changed)) as todo:
        assert todo
    left = content(tmp_path)
    assert TRACKERS in left
    assert "checkpoints/last.ckpt" in left
    assert METRICS in left
    assert "events.out.tfevents.1" in left
    # What the earlier attempt ended with is no longer true.
    assert RESULTS not in left
    assert "error.txt" not in left
    # The ranks read how it goes on.
    assert b"devices: 2" in left[CONFIG]


def test_without_a_checkpoint_it_begins_again(tmp_path: Path) -> None:
    began(tmp_path, checkpoint=False)
    (tmp_path / TRACKERS).write_text("{}")
    with claim(tmp_path, composed()) as todo:
        assert todo
    assert content(tmp_path).keys() == {CONFIG, LOCK}


def test_a_run_that_failed_before_its_first_step_may_become_another(tmp_path: Path) -> None:
    with claim(tmp_path, composed()):
        results("failed").write(tmp_path)
    with claim(tmp_path, composed("data.batch_size=20")) as todo:
        assert todo
    assert content(tmp_path).keys() == {CONFIG, LOCK}


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_size=20", "data.batch_size was 50 and is 20"),
        ("loss=softmax_nll", 'loss.name was "cross_entropy" and is "softmax_nll"'),
        ("loss.label_smoothing=0.1", "loss.label_smoothing was 0.0 and is 0.1"),
        ("seed=1", "seed was 0 and is 1"),
        ("trainer.max_epochs=20", "trainer.max_epochs was 15 and is 20"),
        ("trainer.precision=64-true", 'trainer.precision was "32-true" and is "64-true"'),
        ("+trainer.benchmark=true", "trainer.benchmark was not set and is true"),
    ],
)
def test_another_configuration_is_refused_and_changes_nothing(
    override: str, words: str, checkpoint: bool, tmp_path: Path
) -> None:
    began(tmp_path, checkpoint=checkpoint)
    before = content(tmp_path)
    with pytest.raises(ConfigError) as caught, claim(tmp_path, composed(override)):
        pass
    assert words in str(caught.value)
    assert content(tmp_path) == before


def test_never_refuses_to_touch_a_run(tmp_path: Path) -> None:
    began(tmp_path)
    before = content(tmp_path)
    with (
        pytest.raises(ConfigError, match="already holds a run: name another directory"),
        claim(tmp_path, composed("resume=never")),
    ):
        pass
    assert content(tmp_path) == before


def test_a_completed_run_has_nothing_to_do(tmp_path: Path) -> None:
    began(tmp_path)
    results("completed").write(tmp_path)
    before = content(tmp_path)
    with claim(tmp_path, composed("progress_bar=false")) as todo:
        assert not todo
    assert content(tmp_path) == before


def test_a_completed_run_is_not_reported_as_one_on_other_devices(tmp_path: Path) -> None:
    began(tmp_path)
    results("completed").write(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"completed run .* \(trainer.devices was 1 and is 2\)"),
        claim(tmp_path, composed("trainer.devices=2")),
    ):
        pass


def test_an_evaluation_is_never_taken_for_an_earlier_one(tmp_path: Path) -> None:
    """Its checkpoint may have changed under the same path."""
    evaluation = ("task=test", "ckpt_path=last.ckpt")
    with claim(tmp_path, composed(*evaluation)):
        results("completed").write(tmp_path)
    with (
        pytest.raises(ConfigError, match="already holds a completed run"),
        claim(tmp_path, composed(*evaluation)),
    ):
        pass


def test_every_key_that_may_change_exists() -> None:
    known = {change.key for change in changes({}, composed().plain)}
    assert known >= MAY_CHANGE


def holds(pipe: Connection, directory: Path) -> None:
    with claim(directory, composed()):
        pipe.send(os.getpid())
        pipe.recv()


def test_a_second_live_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    mine, its = multiprocessing.get_context("spawn").Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=holds, args=(its, tmp_path))
    holder.start()
    pid = mine.recv()
    with (
        pytest.raises(ConfigError, match=f"in use by process {pid} on"),
        claim(tmp_path, composed()),
    ):
        pass
    # However it ends, its claim ends with it.
    os.kill(pid, signal.SIGKILL)
    holder.join()
    with claim(tmp_path, composed()) as todo:
        assert todo
