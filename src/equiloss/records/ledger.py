"""`ledger.jsonl` of a sweep directory: how each of the sweep's jobs began and ended.

Hydra's launchers run jobs here, in worker processes or on other machines, so what the jobs say goes
through a file: a line for each attempt at the sweep, and one for each job that begins or ends.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equiloss.errors import RecordError
from equiloss.records.reading import build, open_no_link, parse_json, read_bytes
from equiloss.records.run_dir import LEDGER
from equiloss.records.writing import writing

# Inherited by every process that the launcher starts: the sweep, and which attempt at it.
SWEEP = "EQUILOSS_SWEEP"
ATTEMPT = "EQUILOSS_SWEEP_ATTEMPT"


# A hundred thousand jobs, and what a file with more damage is no longer.
MOST_MIB, MOST_DAMAGED = 64, 1000


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
    swept: list[str] = field(default_factory=list)
    """Keys and config groups that vary, in the order of the command."""


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
    overrides: list[str] = field(default_factory=list)
    """The job's own overrides, `key=value`."""

    @property
    def choices(self) -> dict[str, str]:
        """Values of the overrides by key or config group, as text."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs}


class Ledger:
    """How the jobs of a sweep began and ended.

    Args:
        sweep_dir: The sweep's directory.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.path = sweep_dir / LEDGER

    def begin(
        self, attempt: str, *, jobs: int, objective: str, direction: str, swept: Sequence[str] = ()
    ) -> None:
        """Note that the sweep's command was given.

        Raises:
            FileError: if the ledger cannot be written.
        """
        self._append(Attempt(attempt, jobs, objective, direction, time.time(), list(swept)))

    def add(self, job: int, directory: str, status: str, **details: Any) -> None:
        """Note how a job is doing; jobs of other processes may do so at the same time.

        Raises:
            FileError: if the ledger cannot be written.
        """
        objective = details.get("objective")
        if objective is not None and not math.isfinite(objective):
            details["objective"] = None
        attempt = os.environ.get(ATTEMPT, "")
        self._append(Entry(attempt, job, directory, status, time.time(), **details))

    def attempt(self, attempt: str | None = None) -> Attempt | None:
        """An attempt at the sweep, the newest one by default; None if there is none."""
        attempts = [line for line in self._lines() if isinstance(line, Attempt)]
        asked = [line for line in attempts if attempt in (None, line.attempt)]
        return asked[-1] if asked else None

    def newest(self, attempt: str) -> dict[int, Entry]:
        """The newest line of each job of one attempt at the sweep."""
        entries = [line for line in self._lines() if isinstance(line, Entry)]
        jobs = {entry.job: entry for entry in entries if entry.attempt == attempt}
        return dict(sorted(jobs.items()))

    def choices(self) -> dict[str, dict[str, str]]:
        """What each job's directory was given of the swept keys, in all attempts."""
        lines = list(self._lines())
        swept = {key for line in lines if isinstance(line, Attempt) for key in line.swept}
        return {
            line.directory: {key: line.choices[key] for key in line.choices if key in swept}
            for line in lines
            if isinstance(line, Entry)
        }

    def damaged(self) -> int:
        """How many lines say nothing, such as one that a crash cut short."""
        return sum(line is None for line in self._lines())

    def _append(self, line: Attempt | Entry) -> None:
        text = json.dumps(asdict(line)).encode() + b"\n"
        # One write of one line to a file that is open for appending: lines do not mix.
        with (
            writing(self.path),
            open(self.path, "a+b", buffering=0, opener=open_no_link) as file,
        ):
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                # Half a line ends here first; two processes that do so leave an empty one.
                text = b"\n" + text
            while text:
                text = text[file.write(text) :]

    def _lines(self) -> Iterator[Attempt | Entry | None]:
        """Every line that is not empty; None for a damaged one."""
        if not os.path.lexists(self.path):
            return
        damaged = 0
        for text in read_bytes(self.path, MOST_MIB).decode(errors="replace").splitlines():
            if text:
                line = _parsed(text)
                damaged += line is None
                if damaged > MOST_DAMAGED:
                    raise RecordError(self.path, f"has more than {MOST_DAMAGED} damaged lines")
                yield line


def _parsed(text: str) -> Attempt | Entry | None:
    try:
        tree = parse_json(text)
        return build(Entry, tree) if "job" in tree else build(Attempt, tree)
    except (ValueError, TypeError):
        return None
