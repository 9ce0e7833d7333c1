"""Every name and path of a run directory, and of the sweep directory around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.yaml"
RESULTS = "results.json"
METRICS = "metrics.csv"
EVALUATION = "evaluation.json"
TRACEBACK = "error.txt"
TRAIN_LOG = "train.log"
TRACKERS = "trackers.json"
TRACE = "trace.json"
LOCK = ".lock"
EVENTS = "events.out.tfevents.*"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
BEST = "best.ckpt"
EMA = "ema.ckpt"
# By `test_weights`.
TESTED = {"best": BEST, "last": LAST, "ema": EMA}
INDEX = "index.json"
LAST_CHECKPOINT = f"{CHECKPOINTS}/{LAST}"
# Lightning's own, which earlier versions let it write on SLURM, and which it would prefer to ours.
HPC = "hpc_ckpt_*.ckpt"
DAMAGED = ".damaged"
RANKS = "ranks"
# Of a sweep directory.
LEDGER = "ledger.jsonl"
MULTIRUN = "multirun.yaml"


def has_events(run_dir: Path) -> bool:
    """Whether TensorBoard would find something in a run's directory."""
    return any(run_dir.glob(EVENTS))


def rank_log(run_dir: Path, rank: int) -> Path:
    """Output of a rank beside the first."""
    return run_dir / RANKS / f"rank{rank}.log"


def rank_error(run_dir: Path, rank: int) -> Path:
    """What a rank said as it failed."""
    return run_dir / RANKS / f"rank{rank}.error.json"


def written(run_dir: Path) -> Iterator[Path]:
    """Files that a run has left in its directory, beside its configuration.

    A folder that is a symbolic link is not looked into: what it leads to may be anyone's.
    """
    names = (METRICS, f"{METRICS}{DAMAGED}", RESULTS, EVALUATION, TRACEBACK, TRACKERS, TRACE)
    yield from (run_dir / name for name in names if (run_dir / name).is_file())
    for pattern in (EVENTS, HPC):
        yield from run_dir.glob(pattern)
    states = (LAST, PREVIOUS, BEST, EMA)
    kept = (*states, *(f"{name}{DAMAGED}" for name in states), INDEX)
    for folder, patterns in ((CHECKPOINTS, kept), (RANKS, ("rank*.*",))):
        if not (run_dir / folder).is_symlink():
            for pattern in patterns:
                yield from (run_dir / folder).glob(pattern)


def has_state(run_dir: Path) -> bool:
    """Whether a run has left a full state to go on from."""
    return any((run_dir / CHECKPOINTS / name).exists() for name in (LAST, PREVIOUS))


def last_step(run_dir: Path) -> str:
    """The newest step in metrics.csv, as far as it can be told: for messages."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**14, 0))
            return file.read().splitlines()[-1].partition(b",")[0].decode()
    except (OSError, IndexError, ValueError):
        return "none"


def set_aside(file: Path) -> Path:
    """Rename a damaged file, so that nothing takes it for a good one; returns its new place."""
    return file.replace(file.with_name(f"{file.name}{DAMAGED}"))


def clear(run_dir: Path, *, continued: bool) -> None:
    """Remove what an earlier attempt left, once the new one has passed its preflight.

    Only in a directory that holds a configuration: a claim has then seen that it is ours.

    Args:
        run_dir: The run's directory.
        continued: Whether the run goes on from a checkpoint: only what the earlier attempt ended
            with is then no longer true.
    """
    if not (run_dir / CONFIG).is_file():
        return
    for file in list(written(run_dir)):
        kept = file.name == TRACKERS or file.parent.name == RANKS or file.suffix == DAMAGED
        begins_anew = not continued and not kept
        if begins_anew or file.name in (RESULTS, TRACEBACK) or file.match(HPC):
            file.unlink()


def sweep_of(run_dir: Path) -> Path | None:
    """The nearest directory above a run's that was swept into; None for a single run."""
    above = run_dir.absolute().parents
    marks = (LEDGER, MULTIRUN)
    return next((place for place in above if any((place / m).is_file() for m in marks)), None)
