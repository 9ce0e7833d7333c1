"""`ledger.jsonl` of a sweep directory: how each of the sweep's jobs began and ended.

Hydra's launchers run jobs here, in worker processes or on other machines, so what the jobs say goes
through a file: a line for each attempt at the sweep, and one for each job that begins or ends.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from equiloss.records.run_dir import LEDGER

# Inherited by every process that the launcher starts: the sweep, and which attempt at it.
SWEEP = "EQUILOSS_SWEEP"
ATTEMPT = "EQUILOSS_SWEEP_ATTEMPT"


_Line = TypeVar("_Line", "Attempt", "Entry")


@dataclass(frozen=True)
class Attempt:
    """One invocation of a sweep's command."""

    attempt: str
    jobs: int
    """Jobs of the sweep, 0 where they cannot be known beforehand."""
    objective: str
    """Name of the metric that the jobs return."""
    direction: str
    """minimize | maximize."""
    began: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Entry:
    """How one job is doing."""

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
    seconds: float | None = None
    """Time that the job took, once it has ended."""


class Ledger:
    """How the jobs of a sweep began and ended.

    Args:
        sweep_dir: The sweep's directory.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.path = sweep_dir / LEDGER

    def begin(self, attempt: str, *, jobs: int, objective: str, direction: str) -> None:
        """Note that the sweep's command was given."""
        self._append(Attempt(attempt, jobs, objective, direction, time.time()))

    def add(self, job: int, directory: str, status: str, **details: Any) -> None:
        """Note how a job is doing; jobs of other processes may do so at the same time."""
        objective = details.get("objective")
        if objective is not None and not math.isfinite(objective):
            details["objective"] = None
        attempt = os.environ.get(ATTEMPT, "")
        self._append(Entry(attempt, job, directory, status, time.time(), **details))

    def attempt(self, attempt: str | None = None) -> Attempt | None:
        """An attempt at the sweep, the newest one by default; None if there is none."""
        attempts = [line for line in self._lines(Attempt) if attempt in (None, line.attempt)]
        return attempts[-1] if attempts else None

    def newest(self, attempt: str) -> dict[int, Entry]:
        """The newest line of each job of one attempt at the sweep."""
        jobs = {entry.job: entry for entry in self._lines(Entry) if entry.attempt == attempt}
        return dict(sorted(jobs.items()))

    def _append(self, line: Attempt | Entry) -> None:
        # One write of one line to a file that is open for appending: lines do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(line)).encode() + b"\n")

    def _lines(self, kind: type[_Line]) -> Iterator[_Line]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield kind(**json.loads(line))
            except (ValueError, TypeError):
                continue  # of the other kind, or one that a crash cut short
