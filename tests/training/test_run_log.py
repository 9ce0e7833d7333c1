"""What train.log and the screen say of a run."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from equiloss.launching import console
from equiloss.records.results import Result
from equiloss.records.run_dir import TRAIN_LOG
from equiloss.records.train_log import note
from support import PYTHONPATH, ROOT, Run, Train, slow


def test_the_log_has_beginning_epochs_and_end(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train("debug=fast", "trainer.max_epochs=2", f"hydra.run.dir={run}", "logger=csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fit: cross_entropy, convnet, digits in {run}\n")
    assert "epoch 1/2: train/loss " in done.stdout  # no terminal, no bar
    lines = (run / TRAIN_LOG).read_text()
    for words in (
        " torch 2.",
        "processes: 1, threads of each: 1, 32-true",
        f"configuration {Result.read(run).config_hash[:8]}: loss cross_entropy ",
        "data digits: 128 train, 128 val, 128 test samples, 10 classes",
        " 6 steps of 50 samples",
        " best.ckpt: val/nll ",
        " epoch 1/2, 3 steps: train/loss ",
        " epoch 2/2, 6 steps: train/loss ",
        "cross_entropy: completed",
        f"look at it:    {run}/metrics.csv\n",  # there is nothing for TensorBoard
    ):
        assert words in lines


def test_a_run_with_event_files_is_looked_at_in_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    console.show(Result("completed", "", {"name": "any", "options": {}}), tmp_path)
    assert f"look at it:    tensorboard --logdir {tmp_path}\n" in capsys.readouterr().out


def test_the_log_says_why_a_run_failed(train: Train, tmp_path: Path) -> None:
    assert train("loss.weight=[1,2]", f"hydra.run.dir={tmp_path}/run").returncode == 1
    assert "failed: loss.weight has 2 values" in (tmp_path / "run" / TRAIN_LOG).read_text()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / TRAIN_LOG).symlink_to(tmp_path / "elsewhere")
    note(tmp_path, "a line")
    note(tmp_path / "nowhere", "a line")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_stops_early_says_so(
    run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_here(
        "early_stopping.enabled=true",
        "early_stopping.patience=2",
        "early_stopping.min_delta=10",
        "trainer.max_epochs=10",
    )
    stop = result.stopped_early
    assert (stop["epoch"], stop["of_epochs"], stop["best_epoch"]) == (3, 10, 1)
    assert Result.read(tmp_path / "run") == result
    console.show(result, tmp_path / "run")
    expected = "stopped early, in epoch 3 of 10: val/nll was best in epoch 1 ("
    assert expected in " ".join(capsys.readouterr().out.split())


def test_a_run_that_ends_by_itself_did_not_stop_early(run_here: Run, tmp_path: Path) -> None:
    result = run_here("early_stopping.enabled=true", "debug=fast")
    assert result.stopped_early == {}
    assert "stopped_early" not in (tmp_path / "run" / "results.json").read_text()


@pytest.mark.parametrize(("classes", "shown"), [(4, False), (5, False), (6, True), (None, True)])
def test_top5_of_five_classes_says_nothing(
    classes: int | None, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics: dict[str, float | None] = {"val/loss": 1.0, "val/acc_top5": 1.0}
    result = Result("completed", "", {"name": "focal"}, metrics=metrics, num_classes=classes)
    console.show(result, tmp_path)
    assert ("acc_top5" in capsys.readouterr().out) == shown


@slow
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_a_bar_of_the_whole_run(columns: int, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), "debug=fast", "trainer.max_epochs=2"]
    variables = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path, env=variables)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    for words in (b"steps", b" left ", b"epoch 2/2", b"testing", b"parameters"):
        assert words in shown
    assert b"FLOPs" not in shown
    assert "…".encode() not in shown  # nothing is cut short
    assert (b"val/acc" in shown) == (columns == 120)
