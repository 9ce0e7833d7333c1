"""Run directories: one process at a time, and only the run that is in them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from equiloss.config import Config, resolved
from equiloss.errors import ConfigError
from equiloss.launching.resume import MAY_CHANGE, changes, claim
from equiloss.records.results import Result
from equiloss.records.run_dir import CONFIG, LOCK, METRICS, RESULTS, TRACKERS, clear
from equiloss.report.compare import compare
from equiloss.report.runs import find_runs
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
    changed = (
        *("trainer.devices=2", "data.num_workers=1", "logger=wandb", "data.worker_timeout_s=9"),
        *("trainer.max_time=00:01:00:00", "trainer.rank_timeout_s=9"),
    )
    before = content(tmp_path)
    with claim(tmp_path, composed(*changed)) as todo:
        assert todo
        # Until the run has passed its preflight nothing goes, and then what is no longer true.
        changed_files = {name for name, _ in before.items() - content(tmp_path).items()}
        assert changed_files == {CONFIG, LOCK}
        clear(tmp_path, continued=True)
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
    (tmp_path / "checkpoints" / "mine.ckpt").write_text("")
    (tmp_path / "notes.txt").write_text("")
    before = content(tmp_path)
    with claim(tmp_path, composed()) as todo:
        assert todo
        assert content(tmp_path).keys() == before.keys()
        clear(tmp_path, continued=False)
    # What no run writes is left alone.
    mine = {"notes.txt", "checkpoints/mine.ckpt"}
    assert content(tmp_path).keys() == {CONFIG, LOCK, *mine}


def test_a_run_that_failed_before_its_first_step_may_become_another(tmp_path: Path) -> None:
    with claim(tmp_path, composed()):
        results("failed").write(tmp_path)
    with claim(tmp_path, composed("data.batch_size=20")) as todo:
        assert todo
        clear(tmp_path, continued=False)
    assert content(tmp_path).keys() == {CONFIG, LOCK}


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    "name",
    [
        *("metrics.csv", "results.json", "evaluation.json", "events.out.tfevents.1.host"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt", "ranks/rank1.log"),
    ],
)
def test_what_no_configuration_of_ours_stands_beside_is_refused_and_left(
    name: str, resume: str, tmp_path: Path
) -> None:
    """Another program's, or a run whose config.yaml was lost: its checkpoint is worth more."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of somebody")
    before = content(tmp_path)
    with (
        pytest.raises(ConfigError, match=rf"holds {name} and no config.yaml that tells whose"),
        claim(tmp_path, composed(f"resume={resume}")),
    ):
        pass
    assert content(tmp_path).items() - before.items() <= {(LOCK, b"")}
    # Nor does a run that is started without a claim remove any of it.
    clear(tmp_path, continued=False)
    assert before.items() <= content(tmp_path).items()


@pytest.mark.parametrize(
    "text", ["", "model: resnet\n", "loss: {name: x}\n", "a: [", "\0", "loss: {_target_: x}\n"]
)
def test_a_configuration_of_another_program_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / METRICS).write_text("theirs")
    before = content(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"config.yaml is no configuration of a run of equiloss"),
        claim(tmp_path, composed()),
    ):
        pass
    assert content(tmp_path).items() - before.items() <= {(LOCK, b"")}


def test_what_symbolic_links_lead_to_is_left_alone(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for folder in ("checkpoints", "ranks"):
        (elsewhere / folder).mkdir(parents=True)
    for name in ("checkpoints/best.ckpt", "ranks/rank1.log", METRICS):
        (elsewhere / name).write_text("kept")
    with claim(run, composed()):
        for name in ("checkpoints", "ranks", METRICS):
            (run / name).symlink_to(elsewhere / name)
        before = content(elsewhere)
        clear(run, continued=False)
        assert not os.path.lexists(run / METRICS)  # the link itself was a run's file
        assert (run / "checkpoints").is_symlink()
    assert content(elsewhere) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "(it is empty)"),
        ("a: [", "(it is no YAML (did not find expected node content, line 2))"),
        ("a: &a [1]\nb: *a", "(it has an alias, an anchor or a tag in line 1, as no run writes)"),
        ("loss: {name: x}", "equiloss: name another directory"),
    ],
)
def test_a_damaged_configuration_is_named_with_the_damage(text, words, tmp_path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ConfigError) as caught, claim(tmp_path, composed()):
        pass
    assert str(caught.value).startswith(f"{tmp_path / CONFIG} is no configuration of a run")
    assert words in str(caught.value)
    assert "name another directory with hydra.run.dir=" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", '{"status": "comp', "[]", "\0", "[" * 9999),
        '{"status": "completed", "config_hash": "0", "loss": {"name": "x"}, "metrics": []}',
        '{"status": "completed", "config_hash": "0", "loss": {}}',
        '{"status": "completed"}',
    ],
)
def test_results_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    began(tmp_path)
    (tmp_path / RESULTS).write_text(text)
    with claim(tmp_path, composed()) as todo:
        assert todo


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


@dataclass
class LaterConfig(Config):
    """The schema of a later version, which has a key more."""

    later: int = 3


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From now on the schema is a later one."""
    monkeypatch.setattr(resolved, "Config", LaterConfig)
    resolved._schema.cache_clear()
    yield
    resolved._schema.cache_clear()


def older(directory: Path, *keys: str) -> None:
    """Take keys out of a stored configuration, as if they had come later."""
    stored = OmegaConf.load(directory / CONFIG)
    for key in keys:
        group, _, name = key.rpartition(".")
        del (OmegaConf.select(stored, group) if group else stored)[name]
    OmegaConf.save(stored, directory / CONFIG)


KEYS = ("later", "trainer.shards", "data.augment.cutmix", "early_stopping", "loss.z_loss")


class TestKeysThatCameLater:
    @pytest.fixture
    def stored(self, tmp_path: Path, later: None) -> Path:
        """An interrupted run of an older version."""
        began(tmp_path)
        older(tmp_path, *KEYS)
        return tmp_path

    def test_the_run_is_continued(self, stored: Path) -> None:
        assert "later" in composed().plain
        with claim(stored, composed()) as todo:
            assert todo
        # What continues it has the keys.
        assert "later: 3" in (stored / CONFIG).read_text()

    def test_a_completed_run_is_the_same_run(self, stored: Path) -> None:
        results("completed").write(stored)
        with claim(stored, composed()) as todo:
            assert not todo

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("later=4", "later was 3 and is 4"),
            ("data.augment.cutmix=1.0", "data.augment.cutmix was 0.0 and is 1.0"),
            ("loss.z_loss=1e-4", "loss.z_loss was 0.0 and is 0.0001"),
        ],
    )
    def test_another_value_than_the_default_is_another_run(
        self, change: str, words: str, stored: Path
    ) -> None:
        with pytest.raises(ConfigError, match=words), claim(stored, composed(change)):
            pass

    def test_a_report_sees_no_difference(self, stored: Path, tmp_path: Path) -> None:
        results("completed").write(stored)
        newer = tmp_path / "newer"
        began(newer)
        results("completed").write(newer)
        assert "later" in (newer / CONFIG).read_text()
        for run in (stored, newer):
            (run / METRICS).write_text("step,train/loss\n0,1.0\n")
        comparison = compare(find_runs([stored]))
        assert [run.completed for run in comparison.run_set.runs] == [True, True]
        assert comparison.differing == {}


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
