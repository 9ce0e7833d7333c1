"""Runs that are killed (SIGKILL) and continued, against the same runs uninterrupted."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from equiloss.distributed.process_groups import RankEndedError, run_ranks
from equiloss.invariance import trajectories
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.controls import Kill
from equiloss.invariance.rank_runs import Recorder, Tree, last_checkpoint, read_records, train
from equiloss.records.results import Result
from equiloss.records.run_dir import METRICS

# 200 rows in batches of 23: nine steps an epoch, the last of 16 rows.
STEPS_PER_EPOCH = 9
EPOCHS = 3
OPTIONS: Tree = {
    "data": {"max_samples": 200, "batch_size": 23},
    "trainer": {"max_epochs": EPOCHS},
    "checkpoint": {"every_n_steps": 2},
}
SCHEDULES: dict[str, Tree] = {
    "cosine": {"scheduler": {"name": "cosine", "warmup_fraction": 0.05}},
    "one-cycle": {"scheduler": {"name": "one_cycle", "warmup_fraction": 0.0}},
}
RECORDS, CONTINUED = "records.jsonl", "continued.jsonl"
STATES = {"weights": "state_dict", "optimizer": "optimizer_states", "schedule": "lr_schedulers"}
"""Parts of a checkpoint that are compared, by the key that Lightning saves them under."""


@dataclass(frozen=True)
class Point:
    """One interruption: a run, the step that it is killed at, and the ranks that continue it."""

    world_size: int
    workers: int
    schedule: str
    kill: str
    """The moment of the kill, as `Kill` takes it."""
    step: int
    """Index of the optimizer step."""
    continued_on: int
    """Ranks of the continuation."""

    def __str__(self) -> str:
        ranks = f"W={self.world_size}"
        if self.continued_on != self.world_size:
            ranks += f" to {self.continued_on}"
        epoch, step = divmod(self.step, STEPS_PER_EPOCH)
        kill = f"killed {self.kill} {step} of epoch {epoch}"
        return f"{ranks}, n={self.workers}, {self.schedule}, {kill}"


def points(seed: int = 0) -> list[Point]:
    """The interruptions that are measured: steps drawn by a seed, for each kind of kill.

    >>> len(points()), {point.world_size for point in points()}
    (10, {1, 2})
    """
    draw = random.Random(seed)

    def inside(epoch: int) -> int:
        # The first checkpoint is written after two steps; the last batch has points of its own.
        return epoch * STEPS_PER_EPOCH + draw.randrange(3, STEPS_PER_EPOCH - 1)

    def last_of(epoch: int) -> int:
        return (epoch + 1) * STEPS_PER_EPOCH - 1

    return [
        Point(1, 0, "cosine", "in step", inside(0), 1),
        Point(2, 2, "one-cycle", "after step", inside(0), 2),
        Point(1, 2, "one-cycle", "in step", inside(1), 1),
        Point(2, 0, "cosine", "in step", inside(1), 2),
        Point(1, 0, "one-cycle", "in step", last_of(0), 1),
        Point(2, 0, "cosine", "after step", last_of(1), 2),
        Point(1, 2, "cosine", "in a checkpoint after", inside(1), 1),
        Point(2, 0, "one-cycle", "in a checkpoint after", inside(0), 2),
        Point(2, 0, "cosine", "in step", inside(1), 1),
        Point(1, 0, "cosine", "after step", inside(0), 2),
    ]


def measure(directory: Path) -> dict[str, Part]:
    """Kill and continue a run at every point, and compare it with the uninterrupted one."""
    part = Part(
        "Interruptions",
        f"{EPOCHS} epochs of {STEPS_PER_EPOCH} steps, checkpoints every 2, SIGKILL to every "
        "process (W) with 0 or 2 loader workers (n), and the same directory again. Steps whose "
        "samples are not those of the uninterrupted run, and entries of the last checkpoint's "
        "weights, optimizer, schedule and random generators and of metrics.csv that differ "
        "from it in any bit; all must be 0. On another number of processes: the order, and the "
        f"norm of the weights' difference relative to theirs; at most {trajectories.BOUND:g}.",
    )
    for number, point in enumerate(points()):
        part.cells += _cells(point, directory, number)
    return {"interruptions": part}


def _cells(point: Point, directory: Path, number: int) -> list[Cell]:
    """Kill a run at a point, continue it, and compare it with the uninterrupted run."""
    whole = directory / f"whole-{point.world_size}-{point.schedule}"
    if not whole.exists():
        uninterrupted = replace(point, workers=0)
        run_ranks(_train, point.world_size, whole, uninterrupted, Recorder(whole / RECORDS))
    run_dir = directory / f"killed-{number}"
    attempt = Recorder(run_dir / RECORDS), Kill(point.kill, point.step)
    try:
        run_ranks(_train, point.world_size, run_dir, point, *attempt)
    except RankEndedError as failure:
        if failure.trace:
            raise  # it was not killed
    else:
        raise AssertionError(f"{point}: the run was never killed")
    records = read_records(run_dir / RECORDS)
    assert len(records) > 0
    run_ranks(_train, point.continued_on, run_dir, point, Recorder(run_dir / CONTINUED))

    first, second = Result.read(run_dir).segments
    assert (first["world_size"], second["world_size"]) == (point.world_size, point.continued_on)
    # It went on from a checkpoint, and not from the beginning.
    resumed_at = second["from_step"]
    assert 0 < resumed_at <= point.step + 1
    records = [record for record in records if record["step"] < resumed_at]
    records += read_records(run_dir / CONTINUED)
    expected = read_records(whole / RECORDS)
    pairs = zip_longest(records, expected, fillvalue={"step": None, "ids": None})
    wrong = sum((a["step"], a["ids"]) != (b["step"], b["ids"]) for a, b in pairs)
    row = str(point)
    cells = [Cell(row, "samples", wrong, 0)]
    if point.continued_on != point.world_size:
        difference = trajectories.weight_difference(run_dir, whole)
        return [*cells, Cell(row, "weights, relative", difference, trajectories.BOUND)]
    return [*cells, *(Cell(row, name, count, 0) for name, count in bits(run_dir, whole).items())]


def _train(run_dir: Path, point: Point, *callbacks: Callback) -> None:
    """On every rank: the run of a point, from its last checkpoint if it has one."""
    changes = [OPTIONS, SCHEDULES[point.schedule], {"data": {"num_workers": point.workers}}]
    train(run_dir, *changes, callbacks=callbacks)


def bits(run_dir: Path, reference: Path) -> dict[str, int]:
    """Count the entries of two runs' last states, and of metrics.csv, that differ in any bit."""
    state, expected = last_checkpoint(run_dir), last_checkpoint(reference)
    counts = {name: count_differing(state[key], expected[key]) for name, key in STATES.items()}
    counts["generators"] = count_differing(state["equiloss"]["rng"], expected["equiloss"]["rng"])
    counts["metrics.csv"] = count_differing(_rows(run_dir), _rows(reference))
    return counts


def count_differing(a: Any, b: Any) -> int:
    """Count the leaves of two trees of tensors and plain data that differ in any bit.

    >>> count_differing({"a": [1, 2], "b": 3}, {"a": [1, 4], "c": 3})
    3
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return sum(count_differing(a.get(key, MISSING), b.get(key, MISSING)) for key in keys)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return sum(map(count_differing, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel(), 1)
    return int(a != b)


MISSING = object()


def _rows(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv, without the throughput, which differs with every run."""
    with (run_dir / METRICS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["train/samples_per_s"]
    return rows
