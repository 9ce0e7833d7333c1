"""The report: what it finds, what it says of it, and what it must not be silent about."""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from equiloss.cli import app
from equiloss.config import ParityConfig
from equiloss.errors import ParityError
from equiloss.losses import Criterion
from equiloss.parity import ParityMonitor
from equiloss.report import figures
from equiloss.report.compare import Comparison, Spread, compare
from equiloss.report.page import table, write_report
from equiloss.report.runs import ReportError, find
from equiloss.results import EVALUATION, METRICS, RESULTS, Result

LOSSES = ("softmax_nll", "log_softmax_nll", "cross_entropy")
# Options that not every loss has.
OWN: dict[str, dict[str, Any]] = {"cross_entropy": {"z_loss": 0.0}, "focal": {"gamma": 2.0}}


def formulation(ratio: float = 0.1, *, agree: bool = True) -> dict[str, Any]:
    return {"loss_error": 1e-8, "grad_error": 1e-8, "ratio": ratio, "nonfinite": 0, "agree": agree}


def write_run(
    directory: Path,
    loss: str = "cross_entropy",
    seed: int = 0,
    *,
    precision: str = "32-true",
    devices: int = 1,
    status: str = "completed",
    shift: float = 0.0,
    parity: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    steps: int = 20,
    first_step: int = 0,
    test_loss: float | None = -1.0,
    error: str = "rank 1 was killed by SIGKILL",
    **config: Any,
) -> Path:
    """A run directory as a run would leave it; its training loss is off by a factor 1 + shift."""
    directory.mkdir(parents=True)
    drawn = random.Random(seed)
    losses = [drawn.uniform(0.9, 1.1) / (step + 1) * (1 + shift) for step in range(steps)]
    settings = {
        "loss": {"name": loss, "label_smoothing": 0.0} | (options or OWN.get(loss, {})),
        "trainer": {"precision": precision, "devices": devices},
        "parity": {"formulations": list(LOSSES)},
        "seed": seed,
        "progress_bar": bool(seed % 2),  # never counts
        **config,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    with (directory / METRICS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss", "val/nll", "parity/cross_entropy/ratio"])
        for step, value in enumerate(losses, start=first_step):
            writer.writerow([step, repr(value), repr(value) if step % 10 == 9 else "", 0.1])
    if parity is None:
        parity = {name: formulation() for name in LOSSES} | {"steps": 2, "agree": True}
    result = Result(status, "0" * 64, {"name": loss, "options": {}}, world_size=devices)
    if status == "completed":
        test_loss = losses[-1] if test_loss == -1.0 else test_loss
        result.metrics = {"test/loss": test_loss, "test/acc": 0.9 + seed / 100, "val/nll": 0.5}
        result.timing = {"train_s": 2.0 + seed, "samples_per_s": 1000.0}
        result.parity = parity
        result.environment = {"versions": {"torch": "2.14.1"}, "threads": 1}
    else:
        result.error = error
    result.write(directory)
    return directory


def three_losses(directory: Path, **options: Any) -> None:
    for loss in LOSSES:
        for seed in (0, 1):
            write_run(directory / f"{loss}-s{seed}", loss, seed, **options)


class TestVerdict:
    def test_match(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        three_losses(tmp_path / "exact", precision="64-true")
        verdict = compare(find([tmp_path])).verdict
        assert verdict.word == "match"
        assert verdict.wrong == []
        assert "24 checks in 12 runs" in verdict.lines[0]

    def test_a_formulation_that_disagreed_is_named(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        wrong = {"mine": formulation(300.0, agree=False), "cross_entropy": formulation()}
        write_run(tmp_path / "odd", seed=5, parity=wrong | {"steps": 2, "agree": False})
        comparison = compare(find([tmp_path]))
        assert comparison.verdict.word == "differs"
        assert comparison.verdict.wrong == ["mine in odd"]
        assert comparison.ratios["mine"] == 300

    def test_a_mass_that_disagreed_is_named(self, tmp_path: Path) -> None:
        parity = {"cross_entropy": formulation(), "steps": 1, "agree": False}
        write_run(tmp_path / "run", parity=parity)
        wrong = compare(find([tmp_path])).verdict.wrong
        assert wrong == ["mass or all-reduced loss in run"]

    @pytest.mark.parametrize(("shift", "word"), [(1e-10, "match"), (1e-8, "differs")])
    def test_trajectories_in_float64_are_held_to_their_bound(
        self, shift: float, word: str, tmp_path: Path
    ) -> None:
        write_run(tmp_path / "a", "cross_entropy", precision="64-true")
        write_run(tmp_path / "b", "softmax_nll", precision="64-true", shift=shift)
        verdict = compare(find([tmp_path])).verdict
        assert verdict.word == word
        if word == "differs":
            assert verdict.wrong == ["softmax_nll - cross_entropy, seed 0 (float64)"]

    def test_drift_in_float32_is_told_beside_the_seeds_and_not_judged(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "cross_entropy", 0)
        write_run(tmp_path / "b", "softmax_nll", 0, shift=0.08)
        write_run(tmp_path / "c", "cross_entropy", 1)
        comparison = compare(find([tmp_path]))
        assert comparison.verdict.word == "match"
        (pair,) = comparison.pairs
        assert pair.test_loss == pytest.approx(0.08)
        assert len(comparison.seeds) == 1
        assert "largest relative difference 0.08; between seeds" in comparison.verdict.lines[2]

    def test_a_loss_that_is_no_formulation_is_paired_with_none(self, tmp_path: Path) -> None:
        """It has no reason to take the same steps, whatever its options are called."""
        for loss in ("cross_entropy", "softmax_nll", "focal", "balanced_softmax"):
            write_run(tmp_path / loss, loss, precision="64-true", shift=0.5 * (loss not in LOSSES))
        comparison = compare(find([tmp_path]))
        assert [pair.label for pair in comparison.pairs] == ["softmax_nll - cross_entropy, seed 0"]
        assert comparison.verdict.word == "match"

    def test_an_option_that_is_on_makes_another_function(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", options={"z_loss": 1e-4})
        write_run(tmp_path / "b", "softmax_nll")
        assert compare(find([tmp_path])).pairs == []

    def test_world_sizes_are_paired(self, tmp_path: Path) -> None:
        write_run(tmp_path / "one", precision="64-true")
        write_run(tmp_path / "two", precision="64-true", devices=2, shift=1e-6)
        verdict = compare(find([tmp_path])).verdict
        assert verdict.wrong == ["cross_entropy, W=2 - W=1, seed 0 (float64)"]

    def test_not_checked(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run", parity={})
        assert compare(find([tmp_path])).verdict.word == "not checked"

    def test_equal_bits_are_told(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "cross_entropy")
        write_run(tmp_path / "b", "log_softmax_nll")
        write_run(tmp_path / "c", "softmax_nll", shift=1e-15)
        last = compare(find([tmp_path])).verdict.lines[-1]
        assert "log_softmax_nll - cross_entropy, seed 0." in last
        assert ": softmax_nll" not in last

    @pytest.mark.parametrize("where", ["a step", "the test loss"])
    def test_what_is_not_finite_is_beyond_the_bound(self, where: str, tmp_path: Path) -> None:
        write_run(tmp_path / "fused", precision="64-true")
        if where == "a step":
            run = write_run(tmp_path / "other", "log_softmax_nll", precision="64-true")
            rows = (run / METRICS).read_text().splitlines()
            rows[6] = "5,nan,,0.1"
            (run / METRICS).write_text("\n".join(rows) + "\n")
        else:
            write_run(tmp_path / "other", "log_softmax_nll", precision="64-true", test_loss=None)
        comparison = write_report([tmp_path])
        assert comparison.verdict.word == "differs"
        assert comparison.verdict.wrong == ["log_softmax_nll - cross_entropy, seed 0 (float64)"]
        assert "difference inf" in comparison.verdict.lines[1]

    def test_an_infinite_ratio_is_told_as_such(self, tmp_path: Path) -> None:
        wrong = formulation(agree=False) | {"ratio": None}  # as JSON holds what is not finite
        parity = {"softmax_nll": wrong, "cross_entropy": formulation(), "steps": 1, "agree": False}
        write_run(tmp_path / "run", parity=parity)
        comparison = write_report([tmp_path])
        assert comparison.ratios["softmax_nll"] == float("inf")
        assert "softmax_nll inf" in comparison.verdict.lines[0]

    def test_runs_without_a_step_in_common_do_not_match(self, tmp_path: Path) -> None:
        exact: dict[str, Any] = {"precision": "64-true", "test_loss": None}
        write_run(tmp_path / "fused", **exact)
        late = write_run(tmp_path / "late", "log_softmax_nll", first_step=20, **exact)
        for run in (tmp_path / "fused", late):
            result = Result.read(run)
            del result.metrics["test/loss"]
            result.write(run)
        verdict = write_report([tmp_path]).verdict
        assert verdict.lines[1] == "Trajectories in float64: not measured."
        assert "log_softmax_nll - cross_entropy, seed 0" in verdict.lines[2]

    def test_a_run_that_strict_parity_stopped_is_told(self, tmp_path: Path) -> None:
        """As the monitor itself says it."""
        monitor = ParityMonitor(
            ParityConfig(formulations=["cross_entropy"], policy="raise"),
            Criterion("cross_entropy"),
            total_steps=1,
            seed=0,
        )
        with pytest.raises(ParityError) as stop:
            monitor._report(3, ["cross_entropy (error 7 times its bound)"])
        write_run(tmp_path / "run", status="failed", error=str(stop.value))
        verdict = write_report([tmp_path]).verdict
        assert verdict.word == "differs"
        assert verdict.wrong == [f"run ({stop.value})"]
        assert "cross_entropy (error 7 times its bound)" in verdict.lines[0]

    def test_a_run_that_failed_otherwise_says_nothing(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run", status="failed")
        assert write_report([tmp_path]).verdict.word == "not checked"


class TestBits:
    """Runs with trainer.reduction=bitwise on other numbers of devices."""

    @staticmethod
    def runs(tmp_path: Path, *, shift: float, cpu: str = "one") -> Comparison:
        for devices, off, name in ((1, 0.0, "one"), (2, shift, cpu)):
            run = write_run(tmp_path / str(devices), devices=devices, shift=off)
            result = Result.read(run)
            result.environment |= {"shards": 8, "cpu": name}
            result.write(run)
        return write_report([tmp_path])

    def test_equal(self, tmp_path: Path) -> None:
        verdict = self.runs(tmp_path, shift=0.0).verdict
        assert verdict.word == "match"
        assert "Bitwise equal losses at every step: cross_entropy, W=2 - W=1" in verdict.lines[-1]

    def test_what_differs_is_told(self, tmp_path: Path) -> None:
        verdict = self.runs(tmp_path, shift=1e-7, cpu="other").verdict
        assert verdict.word == "match"
        assert "W=2 - W=1, seed 0 (they differ in cpu)" in verdict.lines[-1]

    def test_without_an_explanation_the_promise_is_broken(self, tmp_path: Path) -> None:
        verdict = self.runs(tmp_path, shift=1e-7).verdict
        assert verdict.word == "differs"
        assert verdict.wrong == ["cross_entropy, W=2 - W=1, seed 0 (bits)"]


class TestSeveralDirectories:
    def test_runs_of_the_same_name_stay_apart(self, tmp_path: Path) -> None:
        write_run(tmp_path / "one" / "fused", precision="64-true")
        write_run(tmp_path / "two" / "fused", "log_softmax_nll", precision="64-true", shift=1e-8)
        comparison = compare(find([tmp_path / "one", tmp_path / "two"]))
        assert [run.name for run in comparison.found.runs] == ["one/fused", "two/fused"]
        assert [group.label for group in comparison.groups] == ["cross_entropy", "log_softmax_nll"]
        assert comparison.verdict.word == "differs"

    def test_a_directory_in_another_counts_once(self, tmp_path: Path) -> None:
        three_losses(tmp_path / "sweep")
        assert len(find([tmp_path, tmp_path / "sweep"]).runs) == 6

    def test_what_no_sweep_varied_is_flagged(self, tmp_path: Path) -> None:
        for name, batch_size in (("one", 50), ("two", 64)):
            three_losses(tmp_path / name, data={"batch_size": batch_size})
            task = ["loss=softmax_nll,log_softmax_nll,cross_entropy", "seed=0,1"]
            hydra = {"overrides": {"task": task}, "sweeper": {"params": None}}
            (tmp_path / name / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
        comparison = compare(find([tmp_path / "one", tmp_path / "two"]))
        assert comparison.unasked == ["data.batch_size"]


class TestGroups:
    def test_they_differ_in_more_than_the_seed(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        write_run(tmp_path / "two", "softmax_nll", 0, devices=2)
        labels = [group.label for group in compare(find([tmp_path])).groups]
        assert labels == [
            "cross_entropy, trainer.devices=1",
            "log_softmax_nll, trainer.devices=1",
            "softmax_nll, trainer.devices=1",
            "softmax_nll, trainer.devices=2",
        ]

    def test_an_option_is_told_where_it_is_on_or_varies(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        write_run(tmp_path / "focal", "focal")
        labels = {group.label for group in compare(find([tmp_path])).groups}
        assert labels == {*LOSSES, "focal, loss.gamma=2.0"}
        write_run(tmp_path / "z", options={"z_loss": 1e-4})
        labels = {group.label for group in compare(find([tmp_path])).groups}
        assert {"cross_entropy, loss.z_loss=0.0", "cross_entropy, loss.z_loss=0.0001"} <= labels

    def test_mean_and_sample_standard_deviation(self, tmp_path: Path) -> None:
        for seed in (1, 2, 6):
            write_run(tmp_path / str(seed), seed=seed)
        (group,) = compare(find([tmp_path])).groups
        # 0.91, 0.92 and 0.96: deviations -0.02, -0.01 and 0.03 from 0.93.
        accuracy = group.spread("test/acc")
        assert accuracy is not None
        assert accuracy.mean == pytest.approx(0.93)
        assert accuracy.deviation == pytest.approx(((4 + 1 + 9) * 1e-4 / 2) ** 0.5)
        assert group.spread("train_s") == Spread(5.0, pytest.approx(7**0.5), 3)
        assert group.spread("test/ece") is None

    def test_failed_runs_are_listed_and_not_counted(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", seed=1, status="failed")
        comparison = write_report([tmp_path])
        assert table(comparison)[1][0][1] == "1/2"
        page = (tmp_path / "report" / "report.md").read_text()
        assert "- b: failed, rank 1 was killed by SIGKILL" in page


class TestWhatIsAmiss:
    @pytest.mark.parametrize("content", ["", '{"status": "comp', "[]", "{}", '{"status": 1}'])
    def test_a_results_file_that_is_none_is_named_and_skipped(
        self, content: str, tmp_path: Path
    ) -> None:
        three_losses(tmp_path)
        broken = write_run(tmp_path / "broken", seed=9)
        (broken / RESULTS).write_text(content)
        comparison = write_report([tmp_path])
        assert list(comparison.found.skipped) == [str(broken)]
        assert len(comparison.found.runs) == 6
        assert f"- {broken}: " in (tmp_path / "report" / "report.md").read_text()

    def test_a_row_that_was_cut_short_is_left_out(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        with (run / METRICS).open("a") as file:
            file.write("20,0.1")
        (found,) = find([tmp_path]).runs
        assert len(found.metrics["train/loss"]) == 20

    def test_a_run_without_results_is_unfinished(self, tmp_path: Path) -> None:
        (write_run(tmp_path / "run") / RESULTS).unlink()
        (found,) = find([tmp_path]).runs
        assert found.result.status == "unfinished"

    def test_what_the_sweep_did_not_vary_is_flagged(self, tmp_path: Path) -> None:
        three_losses(tmp_path, data={"batch_size": 50})
        write_run(tmp_path / "odd", seed=2, data={"batch_size": 64})
        task = ["loss=softmax_nll,log_softmax_nll,cross_entropy", "trainer.max_epochs=3"]
        hydra = {"overrides": {"task": task}, "sweeper": {"params": {"seed": "range(0,3)"}}}
        (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
        comparison = write_report([tmp_path])
        assert comparison.unasked == ["data.batch_size"]
        page = (tmp_path / "report" / "report.md").read_text()
        assert "## Differ in more than what was swept\n\n- data.batch_size" in page

    def test_different_environments_are_flagged(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        other = Result.read(write_run(tmp_path / "b", seed=1))
        other.environment = {"versions": {"torch": "2.13.0"}, "threads": 1}
        other.write(tmp_path / "b")
        assert compare(find([tmp_path])).environments == {"versions.torch": ["2.14.1", "2.13.0"]}

    def test_nothing_to_report_on(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="no run below"):
            find([tmp_path])
        with pytest.raises(ReportError, match="no directory"):
            find([tmp_path / "nowhere"])


EVALUATED: dict[str, Any] = {
    "class_names": ["cat", "dog"],
    "test": {
        "confusion": [[3, 1], [0, 2]],
        "calibration": {"rows": [0, 6], "confidence": [0.0, 5.5], "right": [0, 5]},
    },
}


def none_of_the_test_split(run: Path) -> None:
    (run / EVALUATION).write_text(json.dumps({"class_names": ["cat", "dog"], "val": {}}))


def other_classes(run: Path) -> None:
    three = {
        "class_names": ["a", "b", "c"],
        "test": EVALUATED["test"] | {"confusion": [[1] * 3] * 3},
    }
    (run / EVALUATION).write_text(json.dumps(three))


def no_rows(run: Path) -> None:
    empty = {"rows": [0, 0], "confidence": [0.0, 0.0], "right": [0, 0]}
    ignored = {"confusion": [[0, 0], [0, 0]], "calibration": empty}
    (run / EVALUATION).write_text(json.dumps({"class_names": ["cat", "dog"], "test": ignored}))


def too_many_classes_for_a_matrix(run: Path) -> None:
    names = [str(label) for label in range(101)]
    many = {"class_names": names, "test": EVALUATED["test"] | {"confusion": None}}
    (run / EVALUATION).write_text(json.dumps(many))


def no_timing(run: Path) -> None:
    result = Result.read(run)
    result.timing = {}
    result.write(run)


def no_metrics(run: Path) -> None:
    (run / METRICS).unlink()


@pytest.mark.parametrize(
    "odd",
    [
        none_of_the_test_split,
        other_classes,
        no_rows,
        too_many_classes_for_a_matrix,
        no_timing,
        no_metrics,
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_nll"])
@pytest.mark.parametrize("others", [True, False])
def test_what_is_missing_in_a_run_is_left_out(
    odd: Callable[[Path], None], loss: str, others: bool, tmp_path: Path
) -> None:
    if others:
        three_losses(tmp_path)
        for run in find([tmp_path]).runs:
            (run.directory / EVALUATION).write_text(json.dumps(EVALUATED))
    run = write_run(tmp_path / "odd", loss, seed=7)
    (run / EVALUATION).write_text(json.dumps(EVALUATED))
    odd(run)
    comparison = write_report([tmp_path])
    assert comparison.verdict.word == "match"
    assert comparison.found.skipped == {}


def test_bars_stand_beside_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups the first one has no throughput."""
    three_losses(tmp_path)
    for run in find([tmp_path]).runs:
        if run.loss == "cross_entropy":
            del run.result.timing["samples_per_s"]
            run.result.write(run.directory)
    figure = figures._time(compare(find([tmp_path])))
    assert figure is not None
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names == [sorted(LOSSES), ["log_softmax_nll", "softmax_nll"]]


class TestFiles:
    def test_page_data_and_pictures(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        write_report([tmp_path], tmp_path / "out")
        data = json.loads((tmp_path / "out" / "report.json").read_text())
        assert data["verdict"]["word"] == "match"
        assert len(data["groups"]) == 3
        assert len(data["runs"]) == 6
        page = (tmp_path / "out" / "report.md").read_text()
        for name in ("curves", "parity", "divergence", "time"):
            assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
            assert f"({name}.png)" in page
        # No run kept a confusion matrix: no picture of one.
        assert not (tmp_path / "out" / "confusion.png").exists()

    def test_a_real_run_has_every_picture(self, tmp_path: Path) -> None:
        from equiloss.claim import claim
        from equiloss.run import run
        from support import composed

        for loss in LOSSES:
            config = composed("debug=fast", "callbacks=quiet", f"loss={loss}")
            with claim(tmp_path / loss, config):
                run(config, tmp_path / loss)
        comparison = write_report([tmp_path])
        assert comparison.verdict.word == "match"
        pictures = {file.stem for file in (tmp_path / "report").glob("*.png")}
        assert pictures == {"curves", "parity", "divergence", "confusion", "calibration", "time"}

    def test_the_command(self, tmp_path: Path) -> None:
        three_losses(tmp_path)
        result = CliRunner().invoke(app, ["report", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "verdict: match" in result.output
        result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
        assert result.exit_code == 1
        assert result.output.startswith("error: no directory")

    def test_two_hundred_runs_take_seconds(self, tmp_path: Path) -> None:
        for number in range(200):
            loss = LOSSES[number % 3]
            write_run(tmp_path / str(number), loss, number // 3, steps=300)
        began = time.perf_counter()
        comparison = write_report([tmp_path])
        print(f"200 runs in {time.perf_counter() - began:.1f} s")
        assert len(comparison.completed) == 200


def test_a_wrong_loss_among_the_formulations_is_named(tmp_path: Path) -> None:
    """Its value is right, and its gradient off by 1e-3."""
    import torch.nn.functional as F

    from equiloss.claim import claim
    from equiloss.losses import register, registry
    from equiloss.run import run
    from support import composed

    def off(logits, target, *, label_smoothing: float = 0.0):
        losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        return losses * 1.001 - losses.detach() * 0.001

    register(off)
    try:
        formulations = "parity.formulations=[softmax_nll,cross_entropy,off]"
        for loss in ("softmax_nll", "cross_entropy"):
            config = composed(
                "debug=fast", "callbacks=quiet", "logger=csv", f"loss={loss}", formulations
            )
            with claim(tmp_path / loss, config):
                run(config, tmp_path / loss)
    finally:
        registry.unregister("off")
    verdict = write_report([tmp_path]).verdict
    assert verdict.word == "differs"
    assert verdict.wrong == ["off in cross_entropy", "off in softmax_nll"]
