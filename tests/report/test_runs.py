"""Finding runs, and what a report must not be silent about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equiloss.records.results import Result
from equiloss.records.run_dir import METRICS, RESULTS
from equiloss.report.compare import compare
from equiloss.report.page import page
from equiloss.report.runs import ReportError, find_runs
from equiloss.report.sweeps import swept_keys
from left_behind import three_losses, write_multirun, write_run


@pytest.mark.parametrize("content", ["", '{"status": "comp', "[]", "{}", '{"status": 1}'])
def test_a_results_file_that_is_none_is_named_and_skipped(content: str, tmp_path: Path) -> None:
    three_losses(tmp_path)
    broken = write_run(tmp_path / "broken", seed=9)
    (broken / RESULTS).write_text(content)
    comparison = compare(find_runs([tmp_path]))
    assert list(comparison.run_set.skipped) == [str(broken)]
    assert len(comparison.run_set.runs) == 6
    assert f"- {broken}: " in page(comparison)


# In the middle, and in the last column: 0.1 may have been about to become 0.123.
@pytest.mark.parametrize("cut", ["20,0.1", "20,0.1,,0.1"])
def test_a_row_that_was_cut_short_is_left_out(cut: str, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    with (directory / METRICS).open("a") as file:
        file.write(cut)
    (run,) = find_runs([tmp_path]).runs
    assert len(run.metrics["train/loss"]) == 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "done"),
        ("metrics", {"test/loss": "low"}),
        ("metrics", None),
        ("timing", {"train_s": []}),
        ("parity", {"cross_entropy": {"ratio": 1.0}, "steps": 1, "agree": True}),
        ("parity", {"cross_entropy": {"ratio": 1.0, "agree": True}}),
        ("loss", {}),
        ("loss", "cross_entropy"),
        ("environment", [1]),
        ("world_size", "two"),
    ],
)
def test_results_of_another_form_are_named_and_skipped(
    field: str, value: object, tmp_path: Path
) -> None:
    write_run(tmp_path / "good")
    odd = write_run(tmp_path / "odd", seed=1)
    content = json.loads((odd / RESULTS).read_text()) | {field: value}
    (odd / RESULTS).write_text(json.dumps(content))
    assert list(compare(find_runs([tmp_path])).run_set.skipped) == [str(odd)]


@pytest.mark.parametrize("content", ["step,a\n1\n", "step,a\n1,x\n", "step,a\n,1\n"])
def test_metrics_that_cannot_be_read_are_named_and_the_run_is_kept(
    content: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    (run / METRICS).write_text(content)
    comparison = compare(find_runs([tmp_path]))
    assert list(comparison.run_set.skipped) == [str(run / METRICS)]
    assert [run.completed for run in comparison.run_set.runs] == [True]


def test_a_run_without_results_is_unfinished(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / RESULTS).unlink()
    (run,) = find_runs([tmp_path]).runs
    assert run.result.status == "unfinished"


def test_what_the_sweep_did_not_vary_is_flagged(tmp_path: Path) -> None:
    three_losses(tmp_path, data={"batch_size": 50})
    write_run(tmp_path / "odd", seed=2, data={"batch_size": 64})
    task = ("loss=softmax_nll,log_softmax_nll,cross_entropy", "trainer.max_epochs=3")
    write_multirun(tmp_path, *task, seed="range(0,3)")
    comparison = compare(find_runs([tmp_path]))
    assert comparison.unasked == ["data.batch_size"]
    assert comparison.verdict.lines[-1].endswith("differ in more than was swept: data.batch_size.")
    assert "## Differ in more than what was swept\n\n- data.batch_size" in page(comparison)


def test_different_environments_are_flagged(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    other = Result.read(write_run(tmp_path / "b", seed=1))
    other.environment = {"versions": {"torch": "2.13.0"}, "threads": 1}
    other.write(tmp_path / "b")
    assert compare(find_runs([tmp_path])).environments == {"versions.torch": ["2.14.1", "2.13.0"]}


def test_records_of_hydra_are_no_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    write_run(tmp_path / "run" / ".hydra")
    assert [run.name for run in find_runs([tmp_path]).runs] == ["run"]


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run below"):
        find_runs([tmp_path])
    with pytest.raises(ReportError, match="no directory"):
        find_runs([tmp_path / "nowhere"])


class TestSwept:
    def test_each_sweep_is_held_to_what_it_varied_itself(self, tmp_path: Path) -> None:
        """What the one sweep varied is no excuse for the other."""
        for rate in (0.1, 0.2):
            write_run(tmp_path / "a" / f"run-{rate}", optimizer={"lr": rate})
            write_run(tmp_path / "b" / f"run-{rate}", "softmax_nll", optimizer={"lr": rate})
        write_multirun(tmp_path / "a", "optimizer.lr=0.1,0.2")
        write_multirun(tmp_path / "b", "loss=softmax_nll,cross_entropy")
        together = compare(find_runs([tmp_path / "a", tmp_path / "b"]))
        assert together.unasked == ["optimizer.lr in b"]
        assert compare(find_runs([tmp_path])).unasked == ["optimizer.lr in b"]
        assert compare(find_runs([tmp_path / "a"])).unasked == []

    def test_what_differs_within_sweeps_is_not_told_again(self, tmp_path: Path) -> None:
        for rate in (0.1, 0.2):
            write_run(tmp_path / "a" / f"run-{rate}", optimizer={"lr": rate})
            write_run(tmp_path / "b" / f"run-{rate}", "softmax_nll", optimizer={"lr": rate})
        for sweep in "ab":
            write_multirun(tmp_path / sweep, "loss=softmax_nll,cross_entropy")
        assert compare(find_runs([tmp_path])).unasked == ["optimizer.lr in a", "optimizer.lr in b"]

    def test_what_differs_between_sweeps_is_told_as_such(self, tmp_path: Path) -> None:
        for rate in (0.1, 0.2):
            write_multirun(tmp_path / str(rate), "seed=0,1")
            for seed in (0, 1):
                write_run(tmp_path / str(rate) / str(seed), seed=seed, optimizer={"lr": rate})
        comparison = compare(find_runs([tmp_path]))
        assert comparison.unasked == ["optimizer.lr between sweeps"]

    def test_a_group_that_may_set_any_key_is_told(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", seed=1, data={"batch_size": 64})
        write_multirun(tmp_path, "+experiment=small,large")
        comparison = compare(find_runs([tmp_path]))
        assert comparison.unasked == []
        assert comparison.unsure == ["experiment: its choices may set any key"]
        assert "- experiment: its choices may set any key" in page(comparison)

    def test_the_command_has_the_last_word(self, tmp_path: Path) -> None:
        write_multirun(tmp_path, "seed=3", "data.name='a,b'", "x=[1,2],[3]", seed="0,1", lr="0.1")
        assert swept_keys(tmp_path / "multirun.yaml") == {"x"}

    @pytest.mark.parametrize("content", ["", "hydra: {}", "{", "hydra: {overrides: {task: [=,]}}"])
    def test_a_note_that_cannot_be_read_is_named(self, content: str, tmp_path: Path) -> None:
        write_run(tmp_path / "run")
        (tmp_path / "multirun.yaml").write_text(content)
        run_set = find_runs([tmp_path])
        assert list(run_set.skipped) == [str(tmp_path / "multirun.yaml")]
        assert run_set.swept == {}
