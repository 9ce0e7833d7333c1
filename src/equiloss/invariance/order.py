"""Order of the samples and their augmented pixels, for any number of ranks and loader workers."""

from __future__ import annotations

from pathlib import Path

from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.rank_runs import Recorder, read_records, train

WORLD_SIZES = (1, 2, 3)
WORKERS = (0, 2)
# An epoch is 25 steps long: the order of the second one is another.
STEPS = 30


def measure(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Train in every arrangement, and compare each step's samples and pixels."""
    part = Part(
        "Order and pixels",
        f"{STEPS} steps, over the end of an epoch, on 1 to 3 processes (W) with 0 and 2 loader "
        "workers each (n). Steps whose samples, in their order, or whose augmented pixels are "
        "not those of one process without workers; must be 0.",
    )
    for world_size in world_sizes:
        run_ranks(_runs, world_size, directory)
    part.cells = compare(directory, world_sizes)
    return {"order": part}


def compare(directory: Path, world_sizes: tuple[int, ...] = WORLD_SIZES) -> list[Cell]:
    """Compare the records of every arrangement with those of one process without workers."""
    cells = []
    expected = read_records(directory / _name(1, 0) / "records.jsonl")
    assert len(expected) == STEPS
    assert len({tuple(sorted(record["ids"])) for record in expected}) == STEPS
    for world_size in world_sizes:
        for workers in WORKERS:
            name = _name(world_size, workers)
            records = read_records(directory / name / "records.jsonl")
            for row, key in (("samples", "ids"), ("augmented pixels", "pixels")):
                wrong = sum(a[key] != b[key] for a, b in zip(records, expected, strict=True))
                cells.append(Cell(row, name, wrong, 0))
    return cells


def _name(world_size: int, workers: int) -> str:
    return f"W={world_size}, n={workers}"


def _runs(directory: Path) -> None:
    """On every rank: the runs of one world size."""
    for workers in WORKERS:
        run_dir = directory / _name(collectives.world_size(), workers)
        options = {"trainer": {"max_steps": STEPS}, "data": {"num_workers": workers}}
        train(run_dir, options, callbacks=[Recorder(run_dir / "records.jsonl")])
