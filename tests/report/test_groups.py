"""Which runs belong together, what is said of them, and that none is mistaken for another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from equiloss.report.compare import compare
from equiloss.report.groups import Spread
from equiloss.report.page import page, table
from equiloss.report.runs import find_runs
from left_behind import LOSSES, edit, formulation, three_losses, write_run


def test_they_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    three_losses(tmp_path)
    write_run(tmp_path / "two", "softmax_nll", 0, devices=2)
    labels = [group.label for group in compare(find_runs([tmp_path])).groups]
    assert labels == [
        "cross_entropy, devices=1",
        "log_softmax_nll, devices=1",
        "softmax_nll, devices=1",
        "softmax_nll, devices=2",
    ]


def test_an_option_is_told_where_it_is_on_or_varies(tmp_path: Path) -> None:
    three_losses(tmp_path)
    write_run(tmp_path / "focal", "focal")
    labels = {group.label for group in compare(find_runs([tmp_path])).groups}
    assert labels == {*LOSSES, "focal, gamma=2"}
    write_run(tmp_path / "z", options={"z_loss": 1e-4})
    labels = {group.label for group in compare(find_runs([tmp_path])).groups}
    assert {"cross_entropy, z_loss=0", "cross_entropy, z_loss=0.0001"} <= labels


def test_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    for seed in (1, 2, 6):
        write_run(tmp_path / str(seed), seed=seed)
    (group,) = compare(find_runs([tmp_path])).groups
    # 0.91, 0.92 and 0.96: deviations -0.02, -0.01 and 0.03 from 0.93.
    accuracy = group.spread("test/acc")
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(0.93)
    assert accuracy.deviation == pytest.approx(((4 + 1 + 9) * 1e-4 / 2) ** 0.5)
    assert group.spread("train_s") == Spread(5.0, pytest.approx(7**0.5), 3)
    assert group.spread("test/ece") is None


def test_a_metric_that_is_not_finite_in_one_run_is_not_averaged_away(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    edit(write_run(tmp_path / "b", seed=1), metrics={"test/acc": 0.5, "test/nll": math.inf})
    (group,) = compare(find_runs([tmp_path])).groups
    likelihood = group.spread("test/nll")
    assert likelihood is not None
    assert math.isnan(likelihood.mean)
    assert "not finite" in table(compare(find_runs([tmp_path])))[1][0]


def test_a_curve_is_of_the_completed_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, status="interrupted", replaced={0: 1e6})
    (group,) = compare(find_runs([tmp_path])).groups
    assert group.curve("train/loss")[0][1] < 2


def test_numbers_are_short_where_that_tells_them_apart(tmp_path: Path) -> None:
    for number, rate in enumerate((0.012345678, 0.1)):
        write_run(tmp_path / str(number), optimizer={"lr": rate})
    labels = [group.label for group in compare(find_runs([tmp_path])).groups]
    assert labels == ["cross_entropy, lr=0.01235", "cross_entropy, lr=0.1"]


def test_keys_are_short_where_that_tells_them_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model={"name": "convnet"}, data={"name": "digits"})
    write_run(tmp_path / "b", model={"name": "mlp"}, data={"name": "mnist"})
    labels = [group.label for group in compare(find_runs([tmp_path])).groups]
    assert labels[0] == "cross_entropy, data.name=digits, model.name=convnet"


def test_pairs_say_what_else_tells_them_apart(tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        for loss in ("cross_entropy", "softmax_nll"):
            write_run(tmp_path / f"{loss}-{rate}", loss, optimizer={"lr": rate})
    labels = [pair.label for pair in compare(find_runs([tmp_path])).pairs]
    expected = "softmax_nll - cross_entropy, lr={}, seed 0"
    assert sorted(labels) == [expected.format(0.1), expected.format(0.2)]


class TestSeveralDirectories:
    def test_the_same_runs_in_two_sweeps_stay_apart(self, tmp_path: Path) -> None:
        three_losses(tmp_path / "one" / "sweep", precision="64-true")
        three_losses(tmp_path / "two" / "sweep", precision="64-true", shift=1e-3)
        comparison = compare(find_runs([tmp_path / "one" / "sweep", tmp_path / "two" / "sweep"]))
        names = [run.name for run in comparison.run_set.runs]
        assert len(set(names)) == 12
        assert "one/sweep/cross_entropy-s0" in names
        labels = [group.label for group in comparison.groups]
        assert sorted(labels)[:2] == ["cross_entropy (one/sweep)", "cross_entropy (two/sweep)"]
        assert all(len(group.runs) == 2 for group in comparison.groups)
        # Within a sweep all is well; a sweep is not held against the other one.
        assert len(comparison.pairs) == 8
        assert comparison.verdict.wrong == []

    def test_a_disagreement_is_that_of_its_own_run(self, tmp_path: Path) -> None:
        wrong = {"mine": formulation(9.0, agree=False), "steps": 1, "agree": False}
        write_run(tmp_path / "a" / "run")
        write_run(tmp_path / "b" / "run", parity=wrong)
        verdict = compare(find_runs([tmp_path / "a", tmp_path / "b"])).verdict
        assert verdict.wrong == ["mine in b/run"]

    def test_other_seeds_of_a_sweep_are_taken_together(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a" / "run", seed=0)
        write_run(tmp_path / "b" / "run", seed=1)
        (group,) = compare(find_runs([tmp_path / "a", tmp_path / "b"])).groups
        assert [run.name for run in group.runs] == ["a/run", "b/run"]
        assert len(group.between_seeds("test/loss")) == 1

    def test_a_run_counts_once(self, tmp_path: Path) -> None:
        write_run(tmp_path / "sweep" / "run")
        runs = find_runs([tmp_path, tmp_path / "sweep", tmp_path / "sweep" / "run"]).runs
        assert [run.name for run in runs] == ["sweep/run"]

    def test_a_repeated_run_is_told_and_is_no_seed(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        write_run(tmp_path / "b")
        comparison = compare(find_runs([tmp_path]))
        assert comparison.repeated == ["a", "b"]
        assert comparison.between_seeds == []
        assert comparison.pairs == []
        assert "## The same configuration more than once\n\n- a\n- b\n" in page(comparison)


def test_failed_runs_are_listed_and_not_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, status="failed")
    comparison = compare(find_runs([tmp_path]))
    assert table(comparison)[1][0][1] == "1/2"
    assert "- b: failed, rank 1 was killed by SIGKILL" in page(comparison)
