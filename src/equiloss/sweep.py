"""A sweep on disk: its directory, who works on it, and how each of its jobs ended.

Hydra's launchers run jobs here, in worker processes or on other machines, so what the jobs say
goes through a file of the sweep directory: `ledger.jsonl`, a line for each job that begins or
ends. A sweep directory is named by its overrides; the same command finds it again, leaves completed
runs alone, continues interrupted ones and retries failed ones (see `equiloss.claim`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from equiloss import external
from equiloss.claim import hold
from equiloss.errors import UserError

LEDGER = "ledger.jsonl"
# Inherited by every process that the launcher starts: which attempt at the sweep a job belongs to.
ATTEMPT = "EQUILOSS_SWEEP_ATTEMPT"
JOBS = "EQUILOSS_SWEEP_JOBS"


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    attempt: str
    job: int
    directory: str
    """Name of the run's directory within the sweep's."""
    status: str
    """running | completed | failed | interrupted."""
    time: float
    """Seconds since the epoch."""
    skipped: bool = False
    """Whether an earlier attempt had completed it."""
    objective: float | None = None
    error: str | None = None


class Ledger:
    """How the jobs of a sweep began and ended.

    Args:
        sweep_dir: The sweep's directory.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.path = sweep_dir / LEDGER

    def add(self, job: int, directory: str, status: str, **details: Any) -> None:
        """Append a line; jobs of other processes may do so at the same time."""
        objective = details.get("objective")
        if objective is not None and not math.isfinite(objective):
            details["objective"] = None
        attempt = os.environ.get(ATTEMPT, "")
        entry = Entry(attempt, job, directory, status, time.time(), **details)
        # One write of one line to a file that is open for appending: lines do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(entry)).encode() + b"\n")

    def newest(self, attempt: str) -> dict[int, Entry]:
        """The newest line of each job of one attempt at the sweep."""
        found: dict[int, Entry] = {}
        for line in self._lines():
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that a crash cut short
            if entry.attempt == attempt:
                found[entry.job] = entry
        return dict(sorted(found.items()))

    def began(self, attempt: str) -> float:
        """When the first job of an attempt began, in seconds since the epoch."""
        entries = [json.loads(line) for line in self._lines() if f'"{attempt}"' in line]
        return min((float(entry["time"]) for entry in entries), default=time.time())

    def _lines(self) -> Iterable[str]:
        if not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()


def direction(sweeper: Any, objective: str) -> str:
    """Whether a sweep's objective is to become small or large: minimize | maximize."""
    configured = sweeper.get("direction")
    if configured is None:
        return "maximize" if "acc" in objective else "minimize"
    return str(configured)


def progress(sweep_dir: Path, objective: str, direction: str) -> str:
    """One line: jobs done, running, failed and left, the best so far, and the time left.

    Args:
        sweep_dir: The sweep's directory.
        objective: Name of the metric that the jobs return.
        direction: minimize | maximize.
    """
    ledger, attempt = Ledger(sweep_dir), os.environ.get(ATTEMPT, "")
    entries = ledger.newest(attempt).values()
    counts = {
        status: sum(entry.status == status for entry in entries)
        for status in ("completed", "running", "failed", "interrupted")
    }
    parts = [f"{counts['completed']} done", f"{counts['running']} running"]
    parts += [f"{counts[name]} {name}" for name in ("failed", "interrupted") if counts[name]]
    jobs = int(os.environ.get(JOBS, 0))
    if jobs:
        left = jobs - len(entries)
        parts.append(f"{left} left")
        trained = sum(entry.status != "running" and not entry.skipped for entry in entries)
        if left and trained:
            seconds = (time.time() - ledger.began(attempt)) / trained * (left + counts["running"])
            parts.append(f"about {_duration(seconds)} to go")
    found = [(entry.objective, entry.directory) for entry in entries if entry.objective is not None]
    if found:
        value, directory = max(found) if direction == "maximize" else min(found)
        parts.append(f"best {objective} {value:.6g} in {directory}")
    return f"sweep {sweep_dir.name}: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    """A time to read.

    >>> [_duration(seconds) for seconds in (5, 90, 4000)]
    ['5 s', '2 min', '1.1 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def number_of_jobs(config: DictConfig) -> int:
    """Jobs of a multirun, as far as they can be known before it begins; 0 if they cannot."""
    sweeper = config.hydra.sweeper
    if sweeper.get("n_trials"):
        return int(sweeper.n_trials)
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    chosen: dict[str, int] = {}
    for override in OverridesParser.create().parse_overrides(
        [*params, *config.hydra.overrides.task]
    ):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            return 0
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [""]
        chosen[override.get_key_element()] = len(values)
    return math.prod(chosen.values())


class SweepCallback(Callback):
    """Holds the sweep's directory while Hydra works on it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the directory, and tell the jobs which attempt they belong to."""
        if not external.is_first():
            return  # the first rank holds the directory for all of them
        directory = Path(config.hydra.sweep.dir).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _held.enter_context(hold(directory, wait=config.in_use == "wait"))
        except UserError as error:
            # Hydra turns an exception of a callback into a warning, and goes on.
            sys.exit(f"error: {error}")
        os.environ[ATTEMPT] = uuid.uuid4().hex
        os.environ[JOBS] = str(number_of_jobs(config))
        _current.append(directory)
        sampler = config.hydra.sweeper.get("sampler")
        if sampler is not None and "seed" in sampler and sampler.seed is None:
            print(
                "this sweep cannot be resumed: set hydra.sweeper.sampler.seed, so that the same "
                "command tries the same values again",
                file=sys.stderr,
            )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Nothing: `finish` closes a sweep, however it ended."""


_held = ExitStack()
_current: list[Path] = []


def finish() -> tuple[Path, dict[int, Entry]] | None:
    """Let go of the sweep that this process worked on; its directory and how its jobs ended.

    Returns:
        None if there was no sweep.
    """
    if not _current:
        return None
    directory = _current.pop()
    entries = Ledger(directory).newest(os.environ.get(ATTEMPT, ""))
    _held.close()
    for name in (ATTEMPT, JOBS):
        os.environ.pop(name, None)
    return directory, entries
