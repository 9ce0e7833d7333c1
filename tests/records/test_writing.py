"""A file that cannot be written gets one line, and what was there before is there still."""

from __future__ import annotations

import errno
import logging.config
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer

from equiloss.config import CheckpointConfig
from equiloss.launching.composition_errors import explain
from equiloss.records.atomic import write_atomically
from equiloss.records.ledger import Ledger
from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.writing import FileError
from equiloss.training.checkpoint import Checkpoints
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from support import no_room


def test_a_text_is_replaced_or_left(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_atomically(file, "before")
    with no_room(3), pytest.raises(FileError, match=rf"^cannot write {file}: file too large: "):
        write_atomically(file, "afterwards")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {file.name: "before"}


def test_another_place_is_named_as_the_caller_does(tmp_path: Path) -> None:
    file = tmp_path / "no" / "found.csv"
    with pytest.raises(FileError) as caught:
        write_atomically(file, "text", "name another file with --output")
    why = "no such file or directory: name another file with --output"
    assert str(caught.value) == f"cannot write {file}: {why}"


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "")


def test_a_checkpoint_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own word is `unexpected pos 64 vs 0`."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), MetricsCsv(tmp_path, []))
    checkpoint: dict[str, Any] = {"rows": list(range(10_000))}

    def save(path: Path) -> None:
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)

    trainer = SimpleNamespace(global_step=1, should_stop=False, save_checkpoint=save)
    checkpoints._save_last(cast(Trainer, trainer))
    before = sorted(tmp_path.iterdir())
    trainer.global_step = 2
    with no_room(5000), pytest.raises(FileError, match=r"cannot write .*/last\.ckpt: file too"):
        checkpoints._save_last(cast(Trainer, trainer))
    trainer.global_step = 3
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*: no space left on device"):
        checkpoints._save_last(cast(Trainer, trainer))
    assert sorted(tmp_path.iterdir()) == before
    assert AtomicCheckpointIO().load_checkpoint(checkpoints.last_path) == checkpoint


def test_metrics_of_a_full_disk_end_the_run(tmp_path: Path) -> None:
    metrics = MetricsCsv(tmp_path, ["train/loss"])
    metrics.path = Path("/dev/full")
    line = "cannot write /dev/full: no space left on device: make room there"
    for write in (lambda: metrics.log_metrics({"train/loss": 1.0}, 0), metrics.sync, metrics.close):
        with pytest.raises(FileError) as refused:
            write()
        assert str(refused.value) == line


def test_a_line_of_the_ledger_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(0, "a", "running")
    size = ledger.path.stat().st_size
    with no_room(size + 20), pytest.raises(FileError, match=f"cannot write {ledger.path}"):
        ledger.add(1, "b", "running")
    assert ledger.path.stat().st_size == size + 20
    ledger.add(2, "c", "running")
    assert list(ledger.newest("")) == [0, 2]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "/file: file exists: "),
        ("file/below/it", "/file: not a directory: "),
        ("a" * 300, f"/{'a' * 300}: file name too long: "),
    ],
    ids=["in its place", "in its parent's place", "too long"],
)
def test_a_directory_that_cannot_be_made(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as refused:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    line = explain(refused.value)
    assert line.startswith(f"cannot use {tmp_path}{words}name another directory")


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path)}
    with pytest.raises(ValueError, match="handler") as refused:
        logging.config.dictConfig({"version": 1, "handlers": {"file": handler}})
    assert explain(refused.value).startswith(f"cannot use {tmp_path}: is a directory: ")
