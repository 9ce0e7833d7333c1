"""The report's page, data and pictures, and the command that writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.launching import command
from equiloss.launching.resume import claim
from equiloss.records.ledger import ATTEMPT, Ledger
from equiloss.records.run_dir import EVALUATION, METRICS, RESULTS
from equiloss.report.compare import compare
from equiloss.report.figures import PICTURES
from equiloss.report.page import page, write_report
from equiloss.report.runs import ReportError, find_runs
from equiloss.run import run
from left_behind import LOSSES, edit, formulation, three_losses, write_evaluation, write_run
from support import QUIET, composed


def test_page_data_and_pictures(tmp_path: Path) -> None:
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


def test_a_bar_in_a_label_ends_no_cell(tmp_path: Path) -> None:
    write_run(tmp_path / "a", data={"name": "a|b"})
    write_run(tmp_path / "b", data={"name": "c"})
    assert "| cross_entropy, name=a\\|b | 1/1 |" in page(compare(find_runs([tmp_path])))


def test_a_picture_of_an_older_report_goes(tmp_path: Path) -> None:
    """No run kept a confusion matrix: no picture of one."""
    write_run(tmp_path / "run")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "confusion.png").touch()
    write_report([tmp_path])
    assert not (tmp_path / "report" / "confusion.png").exists()


def test_no_place_for_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "out").touch()
    with pytest.raises(ReportError, match="the report cannot be written to"):
        write_report([tmp_path], tmp_path / "out")


def test_a_real_run_has_every_picture(tmp_path: Path) -> None:
    for loss in LOSSES:
        config = composed("debug=fast", *QUIET, "logger=csv", f"loss={loss}")
        with claim(tmp_path / loss, config):
            run(config, tmp_path / loss)
    comparison = write_report([tmp_path])
    assert comparison.verdict.word == "match"
    pictures = {file.stem for file in (tmp_path / "report").glob("*.png")}
    assert pictures == {"curves", "parity", "divergence", "confusion", "calibration", "time"}


def test_the_command(tmp_path: Path) -> None:
    three_losses(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "verdict: match" in result.output
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert result.output.startswith("error: no directory")


def test_two_hundred_runs_take_seconds(tmp_path: Path) -> None:
    for number in range(200):
        loss = LOSSES[number % 3]
        write_run(tmp_path / str(number), loss, number // 3, steps=300)
    began = time.perf_counter()
    comparison = write_report([tmp_path])
    seconds = time.perf_counter() - began
    print(f"200 runs in {seconds:.1f} s")
    assert [run.completed for run in comparison.run_set.runs] == [True] * 200
    assert seconds < 30  # measured: 1.4 s; the rest is for a machine that does other things too


# File, what is there and what stands there instead; None: everything, or no file at all.
ODD = {
    "no metrics": (METRICS, None, None),
    "no row of metrics": (METRICS, None, "step,train/loss\n"),
    "an empty file of metrics": (METRICS, None, ""),
    "losses of 0": (METRICS, None, "step,train/loss,val/nll\n0,0,0\n1,0,\n"),
    "losses that are not finite": (METRICS, None, "step,train/loss,val/nll\n0,nan,inf\n1,inf,\n"),
    "parity of another run": (METRICS, None, "step,parity/mine/ratio\n0,inf\n"),
    "no timing": (RESULTS, '"train_s": 2.0,\n    "samples_per_s": 1000.0', ""),
    "no throughput": (RESULTS, ',\n    "samples_per_s": 1000.0', ""),
    "throughput alone": (RESULTS, '"train_s": 2.0,', ""),
    "no evaluation": (EVALUATION, None, None),
    "validation only": (EVALUATION, '"test"', '"val"'),
    "another form": (EVALUATION, None, "{}"),
    "half of a file": (EVALUATION, None, '{"class_names": ["0"'),
    "another number of classes": (EVALUATION, '["0", "1", "2"]', '["0", "1"]'),
    "no matrix": (EVALUATION, "[[10, 0, 0], [0, 10, 0], [0, 0, 10]]", "null"),
    "no bins": (EVALUATION, "[0.0, 10.0]", "[]"),
    "other bins": (EVALUATION, "[0.0, 9.0]", "[9.0]"),
    "no row in any bin": (EVALUATION, "[0.0, 10.0]", "[0.0, 0.0]"),
    "bins that are not finite": (EVALUATION, "[0.0, 9.0]", "[0.0, NaN]"),
}


def make_odd(run: Path, name: str, old: str | None, new: str | None) -> None:
    file = run / name
    if new is None:
        file.unlink()
        return
    text = file.read_text()
    assert old is None or old in text
    file.write_text(new if old is None else text.replace(old, new))


def draw(place: Path) -> None:
    comparison = compare(find_runs([place]))
    assert all(run.completed for run in comparison.run_set.runs)
    for picture in PICTURES:
        figure = picture.draw(comparison)
        if figure is not None:
            figure.draw_without_rendering()


@pytest.mark.parametrize("odd", ODD)
def test_what_a_run_lacks_is_not_drawn(odd: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_evaluation(run)
    make_odd(run, *ODD[odd])
    # What the other pictures are made from.
    for name in {METRICS, EVALUATION} - {ODD[odd][0]}:
        (run / name).unlink()
    draw(tmp_path)


def test_what_some_runs_lack_is_drawn_of_the_others(tmp_path: Path) -> None:
    for seed, odd in enumerate([(), *ODD.values()]):
        run = write_run(tmp_path / str(seed), seed=seed)
        write_evaluation(run)
        if odd:
            edit(run, timing={"train_s": 2.0, "samples_per_s": 1000.0})
            make_odd(run, *odd)
    draw(tmp_path)


def test_matrices_of_other_classes_are_not_added_up(tmp_path: Path) -> None:
    for seed, classes in enumerate((3, 5, 3)):
        write_evaluation(write_run(tmp_path / str(seed), seed=seed), classes)
    (confusion,) = (picture for picture in PICTURES if picture.name == "confusion")
    figure = confusion.draw(compare(find_runs([tmp_path])))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "cross_entropy (2 of 3 runs)"
    assert {text.get_text() for text in axes.texts} == {"20"}


def test_bars_stand_at_their_own_names(tmp_path: Path) -> None:
    """The first group has no time, and the last one no throughput."""
    timings = ({"samples_per_s": 7.0}, {"train_s": 2.0, "samples_per_s": 8.0}, {"train_s": 3.0})
    for loss, timing in zip(sorted(LOSSES), timings, strict=True):
        edit(write_run(tmp_path / loss, loss), timing=timing)
    (bars_of_time,) = (picture for picture in PICTURES if picture.name == "time")
    figure = bars_of_time.draw(compare(find_runs([tmp_path])))
    assert figure is not None
    for axes, name in zip(figure.axes, ("train_s", "samples_per_s"), strict=True):
        bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches}
        assert bars == {n: timing[name] for n, timing in enumerate(timings) if name in timing}
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == sorted(LOSSES)


def test_groups_that_are_not_drawn_are_told(tmp_path: Path) -> None:
    for number in range(13):
        write_run(tmp_path / str(number), optimizer={"lr": number})
    text = page(compare(find_runs([tmp_path])), PICTURES)
    assert text.count("The first 12 of 13 groups.") == 3
    assert "The first 6 of 13 groups." in text


def test_a_sweep_that_parity_stopped_altogether_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ATTEMPT, "first")
    error = "parity, step 0: off (error 300 times its bound) differ from the oracle"
    parity = {"off": formulation(300.0, agree=False), "steps": 1, "agree": False}
    write_run(tmp_path / "strict", status="failed", error=error, parity=parity)
    ledger = Ledger(tmp_path)
    ledger.begin("first", jobs=1, objective="val/nll", direction="minimize")
    ledger.add(0, "strict", "failed", error=error)
    assert command._close(tmp_path, ledger.newest("first")) == 1
    assert "verdict: differs; off in strict\n" in capsys.readouterr().out
