"""Runs that are killed (SIGKILL) and continued, against the same runs uninterrupted."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance import trajectories
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.controls import KillAfterStep, KillInStep, KillInWrite
from equiloss.invariance.rank_runs import Recorder, Tree, read_records, train
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
KILLS = {"in step": KillInStep, "after step": KillAfterStep, "in a checkpoint after": KillInWrite}


@dataclass(frozen=True)
class Point:
    """A run, where it is killed, and how it goes on."""

    world_size: int
    workers: int
    schedule: str
    kill: str
    step: int
    """Index of the optimizer step."""
    continued_on: int
    """Ranks of the continuation."""

    def __str__(self) -> str:
        ranks = f"W={self.world_size}"
        if self.continued_on != self.world_size:
            ranks += f" to {self.continued_on}"
        epoch, step = divmod(self.step, STEPS_PER_EPOCH)
        where = f"killed {self.kill} {step} of epoch {epoch}"
        return f"{ranks}, n={self.workers}, {self.schedule}, {where}"


def points(seed: int = 0) -> list[Point]:
    """Where runs are killed: seeded steps in each kind of place.

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
    """Kill and continue at every point."""
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
    """Kill, continue and compare."""
    elastic = point.continued_on != point.world_size
    whole = directory / f"whole-{point.world_size}-{point.schedule}"
    if not whole.exists():
        run_ranks(_whole, point.world_size, whole, point.schedule)
    place = directory / f"killed-{number}"
    try:
        run_ranks(_killed, point.world_size, place, point)
    except RuntimeError as error:
        if "died without a word" not in str(error):
            raise
    else:
        raise AssertionError(f"{point}: the run was never killed")
    seen = read_records(place / RECORDS)
    assert len(seen) > 0
    run_ranks(_continued, point.continued_on, place, point)

    segments = Result.read(place).segments
    assert [segment["world_size"] for segment in segments] == [
        point.world_size,
        point.continued_on,
    ]
    # It went on from a checkpoint, and not from the beginning.
    resumed_at = segments[1]["from_step"]
    assert 0 < resumed_at <= point.step + 1
    seen = [record for record in seen if record["step"] < resumed_at]
    seen += read_records(place / CONTINUED)
    expected = read_records(whole / RECORDS)
    pairs = zip_longest(seen, expected, fillvalue={"step": None, "ids": None})
    wrong = sum((a["step"], a["ids"]) != (b["step"], b["ids"]) for a, b in pairs)
    row = str(point)
    cells = [Cell(row, "samples", wrong, 0)]
    if elastic:
        apart = trajectories.weights_apart(place, whole)
        return [*cells, Cell(row, "weights, relative", apart, trajectories.BOUND)]
    return [*cells, *(Cell(row, name, count, 0) for name, count in bits(place, whole).items())]


def bits(run_dir: Path, reference: Path) -> dict[str, int]:
    """Entries of two runs' last states, and of their metrics.csv, that differ in any bit."""
    ours, theirs = (_last(place) for place in (run_dir, reference))
    found = {name: differing(ours[key], theirs[key]) for name, key in STATES.items()}
    found["generators"] = differing(ours["equiloss"]["rng"], theirs["equiloss"]["rng"])
    found["metrics.csv"] = differing(_rows(run_dir), _rows(reference))
    return found


RECORDS, CONTINUED = "records.jsonl", "continued.jsonl"
STATES = {"weights": "state_dict", "optimizer": "optimizer_states", "schedule": "lr_schedulers"}


def _options(schedule: str, workers: int) -> list[Tree]:
    return [OPTIONS, SCHEDULES[schedule], {"data": {"num_workers": workers}}]


def _whole(place: Path, schedule: str) -> None:
    """On every rank: the run without an interruption."""
    train(place, *_options(schedule, 0), callbacks=[Recorder(place / RECORDS)])


def _killed(place: Path, point: Point) -> None:
    """On every rank: the run up to its death."""
    callbacks: list[Callback] = [Recorder(place / RECORDS), KILLS[point.kill](point.step)]
    train(place, *_options(point.schedule, point.workers), callbacks=callbacks)


def _continued(place: Path, point: Point) -> None:
    """On every rank: the same run again."""
    settings = _options(point.schedule, point.workers)
    train(place, *settings, callbacks=[Recorder(place / CONTINUED)])


def differing(a: Any, b: Any) -> int:
    """Leaves of two trees of tensors and plain data that differ in any bit.

    >>> differing({"a": [1, 2], "b": 3}, {"a": [1, 4], "c": 3})
    3
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return sum(differing(a.get(key, MISSING), b.get(key, MISSING)) for key in keys)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return sum(map(differing, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel(), 1)
    return int(a != b)


MISSING = object()


def _last(run_dir: Path) -> Tree:
    path = run_dir / "checkpoints" / "last.ckpt"
    saved: Tree = torch.load(path, weights_only=True)
    return saved


def _rows(run_dir: Path) -> list[dict[str, str]]:
    """Every row, without what the clock decides."""
    with (run_dir / METRICS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["train/samples_per_s"]
    return rows
