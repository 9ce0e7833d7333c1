"""Which setting is best, by how much, and whether seeds alone do as much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from equiloss.records.ledger import Ledger
from equiloss.records.run_dir import CONFIG, LEDGER
from equiloss.report.compare import LINKS, compare
from equiloss.report.page import page, table, write_report
from equiloss.report.ranking import difference, t975
from equiloss.report.runs import find_runs
from left_behind import edit, write_multirun, write_run


def swept(
    place: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[tuple[str, str, int], float]
) -> None:
    """A sweep over losses, learning rates and seeds, with the objective of each run."""
    monkeypatch.setenv("EQUILOSS_SWEEP_ATTEMPT", "now")
    write_multirun(place, "loss=a,b", "optimizer.lr=0.1,0.2", "seed=0,1")
    ledger = Ledger(place)
    keys = ["loss", "optimizer.lr", "seed"]
    ledger.begin("now", jobs=len(figures), objective="val/nll", direction="minimize", swept=keys)
    for job, ((loss, lr, seed), value) in enumerate(figures.items()):
        name = f"run{job}"
        weight: dict[str, Any] = {"weight": "balanced"} if loss == "balanced" else {}
        base = "cross_entropy" if weight else loss
        run = write_run(
            place / name, base, seed, options=weight or None, optimizer={"lr": float(lr)}
        )
        edit(run, metrics={"val/nll": value, "test/acc": 0.9})
        words = [f"loss={loss}", f"optimizer.lr={lr}", f"seed={seed}"]
        ledger.add(job, name, "completed", objective=value, overrides=words)


FIGURES = {
    ("focal", "0.1", 0): 0.30,
    ("focal", "0.1", 1): 0.34,
    ("balanced", "0.1", 0): 0.20,
    ("balanced", "0.1", 1): 0.24,
    ("focal", "0.2", 0): 0.50,
    ("focal", "0.2", 1): 0.60,
}


def test_settings_have_the_names_that_the_sweep_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(tmp_path, monkeypatch, FIGURES)
    comparison = compare(find_runs([tmp_path]))
    labels = [group.label for group in comparison.groups]
    assert labels == ["balanced, lr=0.1", "focal, lr=0.1", "focal, lr=0.2"]
    best, following, *_ = comparison.summary(tmp_path / "report", [])
    assert best == (
        "best setting: balanced, lr=0.1: val/nll 0.220 ± 0.028 (mean and standard deviation of 2 "
        "seeds)"
    )
    # Seed by seed the same difference: the interval has hardly a width.
    assert following.startswith("the next: focal, lr=0.1: val/nll 0.320 ± 0.028 ")
    assert "worse by 0.1 ± " in following
    assert following.endswith(" (95 % interval over seeds): more than chance")
    head, rows = table(comparison)
    assert head[:4] == ["group", "runs", "val/nll", "to the best"]
    assert [row[0] for row in rows] == labels
    assert rows[0][3] == "-"
    assert rows[2][3].startswith("+0.33 ± ")
    assert page(comparison).startswith("# Report\n\n- best setting: balanced, lr=0.1: val/nll")


def test_one_seed_says_nothing_of_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(tmp_path, monkeypatch, {key: v for key, v in FIGURES.items() if key[2] == 0})
    _, following, *_ = compare(find_runs([tmp_path])).summary(tmp_path, [])
    assert following.endswith("worse by 0.1; whether that is chance, several seeds would tell")


def test_formulations_apart_by_rounding_are_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {("balanced", "0.1", 0): 0.25, ("focal", "0.1", 0): 0.25 + 1e-9}
    swept(tmp_path, monkeypatch, figures)
    _, following, *_ = compare(find_runs([tmp_path])).summary(tmp_path, [])
    assert following.endswith("val/nll 0.25; level to the digits shown (1e-09 apart)")


def test_a_difference_within_the_seeds_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {
        ("a", "0.1", 0): 0.2,
        ("a", "0.1", 1): 0.5,
        ("b", "0.1", 0): 0.4,
        ("b", "0.1", 1): 0.35,
    }
    swept(tmp_path, monkeypatch, figures)
    _, following, *_ = compare(find_runs([tmp_path])).summary(tmp_path, [])
    assert following.endswith(": no more than chance")


def test_a_larger_accuracy_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, accuracy in enumerate((0.5, 0.75)):
        run = write_run(tmp_path / str(number), ("a", "b")[number], objective="val/acc")
        edit(run, metrics={"val/acc": accuracy})
    comparison = compare(find_runs([tmp_path]))
    assert [group.label for group in comparison.groups] == ["b", "a"]
    assert table(comparison)[1][1][3] == "+0.25"


def test_large_figures_have_an_interval() -> None:
    apart = difference({0: [3e100], 1: [5e100]}, {2: [1e100], 3: [2e100]}, "min")
    scaled = difference({0: [3.0], 1: [5.0]}, {2: [1.0], 3: [2.0]}, "min")
    assert apart.half_width == pytest.approx(1e100 * scaled.half_width)


def test_runs_on_different_data_are_not_ranked(tmp_path: Path) -> None:
    for number, name in enumerate(("digits", "digits", "mnist")):
        write_run(tmp_path / str(number), ("a", "b", "c")[number], data={"name": name})
    comparison = compare(find_runs([tmp_path]))
    assert comparison.summary(tmp_path, [])[0] == (
        "no best setting: runs are judged by different data (data.name: digits, mnist)"
    )
    behind = {row[0]: row[3] for row in table(comparison)[1]}
    assert sum(apart == "-" for apart in behind.values()) == 2


def test_a_setting_without_a_figure_comes_last(tmp_path: Path) -> None:
    edit(write_run(tmp_path / "a", "a"), metrics={"val/nll": math.nan})
    write_run(tmp_path / "b", "b", status="failed")
    write_run(tmp_path / "c", "c")
    comparison = compare(find_runs([tmp_path]))
    assert comparison.groups[0].label == "c"
    assert comparison.summary(tmp_path, [])[0].startswith("best setting: c: val/nll 0.5")


def test_intervals_are_student_s() -> None:
    # t for 2 degrees of freedom is 4.3027; the differences 1, 2, 3 have a standard error of 1/√3.
    paired = difference({0: [1.0], 1: [2.0], 2: [3.0]}, {0: [0.0], 1: [0.0], 2: [0.0]}, "min")
    assert paired is not None
    assert paired.half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    # Other seeds: Welch's. Variances 1 and 1 of 3 each: 4 degrees of freedom.
    welch = difference({0: [1.0], 1: [2.0], 2: [3.0]}, {3: [5.0], 4: [6.0], 5: [7.0]}, "max")
    assert welch is not None
    assert welch.mean == pytest.approx(4.0)
    assert welch.half_width == pytest.approx(t975(4) * (2 / 3) ** 0.5)
    assert difference({}, {0: [1.0]}, "min") is None


def test_runs_have_readable_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(tmp_path, monkeypatch, FIGURES)
    folder = tmp_path / "report" / LINKS
    for _ in range(2):  # again, with the links of the first report there
        write_report([tmp_path])
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(f"{loss} lr-{lr} s{seed}" for loss, lr, seed in FIGURES)
    link = folder / "balanced lr-0.1 s0"
    assert str(link.readlink()) == "../../run2"
    assert (link / "results.json").is_file()
    assert len(find_runs([tmp_path]).runs) == len(FIGURES)  # none twice


def test_a_seed_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("seed: 0", "seed: x/../../../up"))
    write_report([tmp_path])
    (link,) = (tmp_path / "report" / LINKS).iterdir()
    assert link.name == "cross_entropy sx .. .. .. up"


@pytest.mark.parametrize("seed", ["[1, 2]", "{a: 1}"])
def test_a_seed_or_a_figure_that_no_run_writes_ends_no_report(seed: str, tmp_path: Path) -> None:
    for name, figure in (("a", 1e200), ("b", 1e308), ("c", 0.5), ("d", 0.25)):
        run = write_run(tmp_path / name, name)
        edit(run, metrics={"val/nll": figure})
        (run / CONFIG).write_text((run / CONFIG).read_text().replace("seed: 0", f"seed: {seed}"))
    comparison = compare(find_runs([tmp_path]))
    assert [group.label for group in comparison.groups[:2]] == ["d", "c"]
    assert comparison.summary(tmp_path, [])[1].endswith("several seeds would tell")
    assert "not finite" in page(comparison)


def test_links_that_cannot_be_made_end_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(tmp_path, monkeypatch, FIGURES)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / LINKS).symlink_to(elsewhere)
    skipped = write_report([tmp_path]).run_set.skipped
    assert "has no links to the runs" in skipped[str(tmp_path / "report" / LINKS)]
    assert list(elsewhere.iterdir()) == []


def test_a_damaged_ledger_costs_the_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(tmp_path, monkeypatch, FIGURES)
    (tmp_path / LEDGER).write_text("garbage\n" * 2000)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.groups[0].label.startswith("cross_entropy, ")
    assert "what was chosen is unknown" in comparison.run_set.skipped[str(tmp_path / LEDGER)]
