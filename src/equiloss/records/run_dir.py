"""Every name and path of a run directory, and of the sweep directory around it."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
RESULTS = "results.json"
METRICS = "metrics.csv"
EVALUATION = "evaluation.json"
TRACEBACK = "error.txt"
TRACKERS = "trackers.json"
LOCK = ".lock"
EVENTS = "events.out.tfevents.*"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"
INDEX = "index.json"
LAST_CHECKPOINT = f"{CHECKPOINTS}/{LAST}"
RANKS = "ranks"
LEDGER = "ledger.jsonl"
MULTIRUN = "multirun.yaml"


def rank_log(run_dir: Path, rank: int) -> Path:
    """Output of a rank beside the first."""
    return run_dir / RANKS / f"rank{rank}.log"


def rank_error(run_dir: Path, rank: int) -> Path:
    """What a rank said as it failed."""
    return run_dir / RANKS / f"rank{rank}.error.json"


def sweep_of(run_dir: Path) -> Path | None:
    """Directory of the sweep that a run belongs to; None for a single run."""
    above = run_dir.absolute().parents
    return next((directory for directory in above if (directory / LEDGER).is_file()), None)
