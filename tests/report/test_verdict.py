"""The verdict: what it says of runs that match, that differ, and that say nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor

from equiloss.launching.resume import claim
from equiloss.losses import register, registry
from equiloss.records.run_dir import METRICS
from equiloss.report.compare import compare
from equiloss.report.page import data, page
from equiloss.report.runs import find_runs
from equiloss.report.verdict import Verdict
from equiloss.run import run
from left_behind import edit, formulation, three_losses, write_run
from support import composed

FAST = ("debug=fast", "callbacks=quiet", "logger=csv")


def off(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Its value is right, and its gradient off by 1e-3."""
    losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    return losses * 1.001 - losses.detach() * 0.001


def test_match(tmp_path: Path) -> None:
    three_losses(tmp_path)
    three_losses(tmp_path / "exact", precision="64-true")
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.word == "match"
    assert verdict.wrong == []
    assert "24 checks in 12 runs" in verdict.lines[0]
    assert verdict.headline == (
        "verdict: match; the three formulations agree on every run's logits (24 checks, largest "
        "error 0.1 of its bound); trajectories in float64 within 1e-09"
    )


def test_a_formulation_that_disagreed_is_named(tmp_path: Path) -> None:
    three_losses(tmp_path)
    wrong = {"mine": formulation(300.0, agree=False), "cross_entropy": formulation()}
    write_run(tmp_path / "odd", seed=5, parity=wrong | {"steps": 2, "agree": False})
    comparison = compare(find_runs([tmp_path]))
    assert comparison.verdict.word == "differs"
    assert comparison.verdict.wrong == ["mine in odd"]
    assert comparison.verdict.where == ["mine in odd: error up to 300 times its bound"]
    assert comparison.ratios["mine"] == 300


def test_a_mass_that_disagreed_is_named(tmp_path: Path) -> None:
    parity = {"cross_entropy": formulation(), "steps": 1, "agree": False}
    write_run(tmp_path / "run", parity=parity)
    wrong = compare(find_runs([tmp_path])).verdict.wrong
    assert wrong == ["mass or all-reduced loss in run"]


@pytest.mark.parametrize(("shift", "word"), [(1e-10, "match"), (1e-8, "differs")])
def test_trajectories_in_float64_are_held_to_their_bound(
    shift: float, word: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "a", "cross_entropy", precision="64-true")
    write_run(tmp_path / "b", "softmax_nll", precision="64-true", shift=shift)
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.word == word
    if word == "differs":
        assert verdict.wrong == ["softmax_nll - cross_entropy, seed 0 (float64)"]


def test_drift_in_float32_is_told_beside_the_seeds_and_not_judged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy", 0)
    write_run(tmp_path / "b", "softmax_nll", 0, shift=0.08)
    write_run(tmp_path / "c", "cross_entropy", 1)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.verdict.word == "match"
    (pair,) = comparison.pairs
    assert pair.test_loss == pytest.approx(0.08)
    assert len(comparison.between_seeds) == 1
    drift = comparison.verdict.lines[2]
    assert "largest relative difference 0.08 (0.08 on average); between seeds" in drift


def test_world_sizes_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "one", precision="64-true")
    write_run(tmp_path / "two", precision="64-true", devices=2, shift=1e-6)
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.wrong == ["cross_entropy, W=2 - W=1, seed 0 (float64)"]


def test_not_checked(tmp_path: Path) -> None:
    write_run(tmp_path / "run", parity={})
    assert compare(find_runs([tmp_path])).verdict.word == "not checked"


def test_equal_bits_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy")
    write_run(tmp_path / "b", "log_softmax_nll")
    write_run(tmp_path / "c", "softmax_nll", shift=1e-15)
    last = compare(find_runs([tmp_path])).verdict.lines[-1]
    assert "log_softmax_nll - cross_entropy, 32-true (1 of 1 seeds)." in last
    assert ": softmax_nll" not in last


def test_losses_that_are_not_formulations_of_one_function_are_no_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy", precision="64-true")
    write_run(tmp_path / "b", "margin", precision="64-true", shift=0.5)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.pairs == []
    assert comparison.verdict.word == "agree"
    assert comparison.verdict.headline == (
        "verdict: the three formulations agree on every run's logits (4 checks, largest error 0.1 "
        "of its bound)"
    )


def test_an_option_that_is_on_makes_another_function(tmp_path: Path) -> None:
    write_run(tmp_path / "a", options={"z_loss": 1e-4})
    write_run(tmp_path / "b", "softmax_nll")
    assert compare(find_runs([tmp_path])).pairs == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 19])
def test_what_is_not_finite_is_beyond_the_bound(step: int, value: float, tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy", precision="64-true")
    write_run(tmp_path / "b", "softmax_nll", precision="64-true", replaced={step: value})
    edit(tmp_path / "b", metrics={"test/loss": 1.0})
    edit(tmp_path / "a", metrics={"test/loss": 1.0})
    comparison = compare(find_runs([tmp_path]))
    assert comparison.verdict.word == "differs"
    assert comparison.verdict.wrong == ["softmax_nll - cross_entropy, seed 0 (float64)"]
    assert comparison.verdict.where[0].endswith(f"up to inf, first at step {step}")
    (pair,) = data(comparison)["pairs"]
    assert pair["largest"] == "inf"


def test_a_test_loss_that_is_not_finite_is_beyond_the_bound(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy", precision="64-true")
    write_run(tmp_path / "b", "softmax_nll", precision="64-true")
    edit(tmp_path / "b", metrics={"test/loss": math.nan})
    assert compare(find_runs([tmp_path])).verdict.word == "differs"


def test_an_infinite_ratio_is_beyond_the_bound(tmp_path: Path) -> None:
    """Results hold it as null, and a hand may have left `agree` as it was."""
    parity = {"cross_entropy": formulation(math.inf), "steps": 1, "agree": True}
    write_run(tmp_path / "run", parity=parity)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.ratios == {"cross_entropy": math.inf}
    assert comparison.verdict.wrong == ["cross_entropy in run"]
    assert "cross_entropy inf" in comparison.verdict.lines[0]


def test_runs_without_a_step_in_common_cannot_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy", precision="64-true", parity={})
    write_run(tmp_path / "b", "softmax_nll", precision="64-true", parity={}, first=100)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.verdict.word == "not checked"
    assert comparison.verdict.ways["float64"] == "not comparable"
    assert "softmax_nll - cross_entropy, seed 0" in comparison.verdict.lines[1]
    assert "| 64-true | 0 of 40 | not comparable | 0 |" in page(comparison)


def test_equal_bits_need_equal_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "cross_entropy")
    write_run(tmp_path / "b", "softmax_nll", steps=10)
    comparison = compare(find_runs([tmp_path]))
    assert "Bitwise" not in comparison.verdict.lines[-1]
    assert "| softmax_nll - cross_entropy, seed 0 | 32-true | 10 of 20 | 0 |" in page(comparison)


def test_what_a_run_logged_before_it_broke_off_counts(tmp_path: Path) -> None:
    three_losses(tmp_path)
    broken = write_run(tmp_path / "broken", seed=7, status="interrupted")
    rows = (broken / METRICS).read_text().replace(",0.1\n", ",17.5\n", 1)
    (broken / METRICS).write_text(rows)
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.wrong == ["cross_entropy in broken"]
    expected = "cross_entropy in broken: error up to 17.5 times its bound, first at step 0"
    assert verdict.where == [expected]
    assert "in 7 runs, 1 of them not completed" in verdict.lines[0]


def test_runs_that_broke_off_prove_no_match(tmp_path: Path) -> None:
    write_run(tmp_path / "run", status="interrupted")
    verdict = compare(find_runs([tmp_path])).verdict
    assert (verdict.word, verdict.ways["lockstep"]) == ("not checked", "no completed run")


def test_logits_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """The one way to disagree within the bound."""
    parity = {"cross_entropy": formulation(0.5, agree=False), "steps": 1, "agree": False}
    write_run(tmp_path / "run", parity=parity)
    (description,) = compare(find_runs([tmp_path])).verdict.where
    assert description.endswith("error up to 0.5 times its bound, and logits that are not finite")


def test_rows_beyond_the_domain_are_told(tmp_path: Path) -> None:
    parity = {"softmax_nll": formulation() | {"out_of_domain": 12}, "steps": 1, "agree": True}
    write_run(tmp_path / "run", parity=parity)
    line = compare(find_runs([tmp_path])).verdict.lines[0]
    assert line.endswith("Rows beyond a formulation's domain, not judged: softmax_nll 12.")


@pytest.fixture
def wrong_loss() -> Iterator[None]:
    register(off)
    yield
    registry.unregister("off")


@pytest.mark.usefixtures("wrong_loss")
def test_a_wrong_loss_among_the_formulations_is_named(tmp_path: Path) -> None:
    formulations = "parity.formulations=[softmax_nll,cross_entropy,off]"
    for loss in ("softmax_nll", "cross_entropy"):
        config = composed(*FAST, f"loss={loss}", formulations)
        with claim(tmp_path / loss, config):
            run(config, tmp_path / loss)
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.word == "differs"
    assert verdict.wrong == ["off in cross_entropy", "off in softmax_nll"]
    assert verdict.where[0].endswith("times its bound, first at step 0")


def test_a_run_that_parity_stopped_differs(tmp_path: Path) -> None:
    """By its results, whatever its error says."""
    three_losses(tmp_path)
    parity = {"off": formulation(300.0, agree=False), "steps": 1, "agree": False}
    write_run(tmp_path / "strict", seed=2, status="failed", parity=parity, error="it was told to")
    verdict = compare(find_runs([tmp_path])).verdict
    assert verdict.word == "differs"
    assert verdict.wrong == ["off in strict"]
    assert verdict.where[0] == "off in strict: error up to 300 times its bound"


def test_a_run_that_failed_otherwise_says_nothing(tmp_path: Path) -> None:
    (write_run(tmp_path / "run", status="failed") / METRICS).unlink()
    assert compare(find_runs([tmp_path])).verdict.word == "not checked"


class TestBits:
    """Runs with trainer.reduction=bitwise on other numbers of devices."""

    @staticmethod
    def verdict(place: Path, *, shift: float, cpu: str = "one") -> Verdict:
        for devices, off, name in ((1, 0.0, "one"), (2, shift, cpu)):
            run = write_run(place / str(devices), devices=devices, shift=off)
            edit(run, environment={"shards": 8, "cpu": name})
        return compare(find_runs([place])).verdict

    def test_equal(self, tmp_path: Path) -> None:
        verdict = self.verdict(tmp_path, shift=0.0)
        assert verdict.word == "match"
        assert "Bitwise equal losses at every step: cross_entropy, W=2 - W=1" in verdict.lines[-1]

    def test_what_differs_is_told(self, tmp_path: Path) -> None:
        verdict = self.verdict(tmp_path, shift=1e-7, cpu="other")
        assert verdict.word == "match"
        assert "W=2 - W=1, seed 0 (they differ in cpu)" in verdict.lines[-1]

    def test_without_an_explanation_the_promise_is_broken(self, tmp_path: Path) -> None:
        verdict = self.verdict(tmp_path, shift=1e-7)
        assert verdict.word == "differs"
        assert verdict.wrong == ["cross_entropy, W=2 - W=1, seed 0 (bits)"]
        assert verdict.where == ["cross_entropy, W=2 - W=1, seed 0 (bits): first at step 0"]
