"""The proofs over whole runs hold, and notice what they are there to notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equiloss.config import SPLIT_METRICS
from equiloss.invariance import evaluation, interruption, order, trajectories
from equiloss.records.results import Result, write_evaluations
from equiloss.records.run_dir import METRICS
from support import slow


@slow  # of fewer: tests/training/test_step.py
def test_a_hundred_steps_are_those_of_one_process(tmp_path: Path) -> None:
    part = trajectories.measure(tmp_path)["trajectories"]
    assert [cell for cell in part.cells if not cell.holds] == []
    # Every split but the reference: loss, gradient norm and weights.
    assert len(part.cells) == (4 * 2 - 1) * 3
    assert all(len(values) == 100 for values in part.series.values())
    assert max(part.series["loss, control"]) > 1e-3
    # A curve that was altered at one step is found out.
    file = tmp_path / "W=3, m=4" / METRICS
    rows = file.read_text().splitlines()
    line = next(number for number, row in enumerate(rows) if row.startswith("49,"))
    fields = rows[line].split(",")
    fields[1] = repr(float(fields[1]) * (1 + 1e-9))
    rows[line] = ",".join(fields)
    file.write_text("\n".join(rows) + "\n")
    curve = trajectories.curve_differences(file.parent, tmp_path / "W=1, m=1", "train/loss")
    assert curve.index(max(curve)) == 49
    assert max(curve) > trajectories.BOUND


def test_order_and_pixels_are_those_of_one_process(tmp_path: Path) -> None:
    worlds = (1, 3)  # and two: `make invariance`
    part = order.measure(tmp_path, worlds)["order"]
    assert [cell for cell in part.cells if not cell.holds] == []
    assert len(part.cells) == len(worlds) * 2 * 2
    # Two samples of one batch that change places are found out.
    records = tmp_path / "W=3, n=2" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    ids = lines[3]["ids"]
    ids[0], ids[1] = ids[1], ids[0]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = [cell for cell in order.compare(tmp_path, worlds) if not cell.holds]
    assert [(cell.row, cell.column, cell.figure) for cell in broken] == [("samples", "W=3, n=2", 1)]


def write_evaluated(
    run_dir: Path, metrics: dict[str, float | None], samples: int, confusion: list[list[int]]
) -> None:
    run_dir.mkdir()
    Result(
        "completed", "", {"name": "any", "options": {}}, metrics=metrics, samples={"test": samples}
    ).write(run_dir)
    write_evaluations(run_dir, {"test": {"confusion": confusion}}, ["a", "b"])


def test_a_padded_evaluation_is_found_out(tmp_path: Path) -> None:
    """One sample counted twice, as a padding sampler does."""
    metrics: dict[str, float | None] = {f"test/{name}": 0.5 for name in SPLIT_METRICS}
    write_evaluated(tmp_path / "W=1, N=3", metrics, 3, [[2, 0], [0, 1]])
    padded = metrics | {"test/nll": 0.6, "test/acc": 0.75}
    write_evaluated(tmp_path / "W=2, N=3", padded, 4, [[3, 0], [0, 1]])
    cells = evaluation.compare(tmp_path, 3, (1, 2))
    assert {cell.row for cell in cells if not cell.holds} == {
        "N=3, nll",
        "N=3, acc",
        "N=3, confusion matrix",
        "N=3, samples",
    }


@slow  # tests/test_resume.py is faster, and stops a run after each of its steps
def test_killed_runs_continue_to_the_bit(tmp_path: Path) -> None:
    part = interruption.measure(tmp_path)["interruptions"]
    assert [cell for cell in part.cells if not cell.holds] == []
    points = interruption.points()
    elastic = [point for point in points if point.world_size != point.continued_on]
    assert len(points) - len(elastic) == 8
    assert len(part.cells) == 8 * 6 + 2 * 2
    assert {point.workers for point in points} == {0, 2}
    assert {point.schedule for point in points} == {"cosine", "one-cycle"}
    epochs = {point.step // interruption.STEPS_PER_EPOCH for point in points}
    assert epochs == {0, 1}


@pytest.mark.parametrize("kill", ["in step", "after step", "in a checkpoint after"])
def test_each_kind_of_kill_is_among_the_points(kill: str) -> None:
    assert {point.world_size for point in interruption.points() if point.kill == kill} == {1, 2}


def test_configurations_of_the_proofs_are_the_projects_own() -> None:
    """conf/ is not in the package, so its choices are repeated there."""
    from equiloss.invariance.rank_runs import DEFAULTS
    from support import composed

    ours = composed().plain
    for group in ("optimizer", "scheduler"):
        assert DEFAULTS[group] == {key: ours[group][key] for key in DEFAULTS[group]}
    assert DEFAULTS["data"]["val_fraction"] == ours["data"]["val_fraction"]
