"""What a run leaves behind in numbers: nothing is lost on the way to the file and back."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.results import Result, environment, metric_names
from equiloss.records.run_dir import METRICS, RESULTS

COLUMNS = ["train/loss", "val/nll"]


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[MetricsCsv]:
    logger = MetricsCsv(tmp_path, COLUMNS)
    yield logger
    logger.close()


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestMetricsCsv:
    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=20))
    def test_floats_read_back_to_the_same_bits(self, tmp_path_factory, values):
        directory = tmp_path_factory.mktemp("run")
        logger = MetricsCsv(directory, COLUMNS)
        for step, value in enumerate(values):
            logger.log_metrics({"train/loss": value}, step)
        logger.close()
        read = [float(row["train/loss"]) for row in rows(directory)]
        assert [value.hex() for value in read] == [value.hex() for value in values]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2])
    def test_extremes_do_too(self, metrics, tmp_path, value):
        metrics.log_metrics({"train/loss": value}, 0)
        read = float(rows(tmp_path)[0]["train/loss"])
        assert read.hex() == value.hex()

    def test_what_a_step_did_not_log_is_empty(self, metrics, tmp_path):
        metrics.log_metrics({"train/loss": 1.0}, 0)
        metrics.log_metrics({"val/nll": 2.0}, 0)
        assert rows(tmp_path) == [
            {"step": "0", "train/loss": "1.0", "val/nll": ""},
            {"step": "0", "train/loss": "", "val/nll": "2.0"},
        ]

    def test_a_killed_run_keeps_what_it_logged(self, metrics, tmp_path):
        metrics.log_metrics({"train/loss": 1.0}, 0)
        assert len(rows(tmp_path)) == 1  # nothing was closed or flushed

    def test_the_test_after_a_fit_goes_on_in_the_same_file(self, metrics, tmp_path):
        metrics.log_metrics({"train/loss": 1.0}, 0)
        metrics.finalize("success")
        metrics.log_metrics({"val/nll": 2.0}, 1)
        assert len(rows(tmp_path)) == 2

    def test_a_metric_without_a_column_is_left_out_and_named_once(self, metrics, tmp_path, caplog):
        for step in range(2):
            metrics.log_metrics({"mine/lr": 1.0, "epoch": 0}, step)
            metrics.log_metrics({"mine/lr": 1.0, "train/loss": 2.0}, step)
        assert [row["train/loss"] for row in rows(tmp_path)] == ["2.0", "2.0"]
        assert metrics.rows == 2
        assert caplog.messages == [f"{tmp_path / 'metrics.csv'} has no columns for mine/lr"]

    def test_a_run_that_logs_nothing_leaves_no_file(self, metrics, tmp_path):
        metrics.finalize("success")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "kept"),
        [(b"", 0), (b"\xff\n1\n", 0), (b"step,a\n1,2\n", 0), (None, 1)],
    )
    def test_of_a_damaged_file_the_whole_rows_go_on(self, content, kept, metrics, tmp_path):
        metrics.log_metrics({"train/loss": 1.0}, 0)
        metrics.close()
        half = (tmp_path / METRICS).read_bytes() + b"1,2"
        (tmp_path / METRICS).write_bytes(half if content is None else content)
        metrics.continue_after(2)
        metrics.log_metrics({"train/loss": 3.0}, 2)
        metrics.close()
        assert [row["train/loss"] for row in rows(tmp_path)] == ["1.0"] * kept + ["3.0"]
        assert (tmp_path / "metrics.csv.damaged").read_bytes() == (
            half if content is None else content
        )


class TestNames:
    def test_they_are_the_same_for_every_loss_and_distinct(self):
        names = metric_names(["softmax_nll", "cross_entropy"])
        assert len(set(names)) == len(names)
        documented = {
            *("train/loss", "train/grad_norm", "train/lr", "train/samples_per_s"),
            "train/skipped_steps",
            *(
                f"{s}/{m}"
                for s in ("val", "test")
                for m in ("loss", "nll", "acc", "balanced_acc", "acc_top5", "ece")
            ),
            *(
                f"parity/{loss}/{m}"
                for loss in ("softmax_nll", "cross_entropy")
                for m in ("loss_error", "grad_error", "ratio", "nonfinite")
            ),
            *("parity/max_ratio", "parity/global_error"),
        }
        assert documented <= set(names)


RESULT = Result(
    status="completed",
    config_hash="0123abcd",
    loss={"name": "cross_entropy", "weight": [1.0, 2.0], "label_smoothing": 0.1},
    metrics={"test/acc": 0.1 + 0.2, "test/nll": 5e-324},
    parity={"agree": True, "steps": 2, "cross_entropy": {"ratio": 0.1, "agree": True}},
    samples={"train_seen": 100, "val": 10, "test": 10},
    steps={"taken": 2, "skipped": 0, "zero_mass": 0},
    world_size=2,
    timing={"train_s": 0.5},
    environment={"threads": 1, "git_commit": None},
)


class TestResult:
    def test_what_is_written_is_read(self, tmp_path):
        RESULT.write(tmp_path)
        assert Result.read(tmp_path) == RESULT

    def test_the_next_one_replaces_it(self, tmp_path):
        RESULT.write(tmp_path)
        failed = Result("failed", "0123abcd", {"name": "cross_entropy"}, error="no such file")
        failed.write(tmp_path)
        assert Result.read(tmp_path) == failed
        assert [file.name for file in tmp_path.iterdir()] == [RESULTS]

    def test_only_a_failure_has_an_error(self, tmp_path):
        RESULT.write(tmp_path)
        assert "error" not in json.loads((tmp_path / RESULTS).read_text())

    def test_numbers_that_are_not_finite_become_null_wherever_they_are(self, tmp_path):
        metrics = {"test/nll": math.nan, "test/loss": math.inf, "test/acc": 0.5}
        parity = {"softmax_nll": {"loss_error": -math.inf, "all": [1.0, math.nan]}}
        Result("completed", "0", {}, metrics=metrics, parity=parity).write(tmp_path)

        def no_constant(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        text = (tmp_path / RESULTS).read_text()
        data = json.loads(text, parse_constant=no_constant)
        assert data["metrics"] == {"test/nll": None, "test/loss": None, "test/acc": 0.5}
        assert data["parity"]["softmax_nll"] == {"loss_error": None, "all": [1.0, None]}

    def test_the_environment_is_json(self):
        described = environment(torch.device("cpu"))
        assert json.loads(json.dumps(described)) == described
        assert torch.__version__.startswith(described["versions"]["torch"])  # +cpu, +cu130
        assert described["device"] == "cpu"
        assert described["threads"] == torch.get_num_threads()

    @pytest.mark.parametrize("installed", [True, False])
    def test_no_commit_outside_a_repository_or_without_git(self, tmp_path, monkeypatch, installed):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        if not installed:
            monkeypatch.setenv("PATH", str(tmp_path))
        assert environment(torch.device("cpu"))["git_commit"] is None
