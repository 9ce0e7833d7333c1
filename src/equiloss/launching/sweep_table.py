"""How far a sweep has come, in one line and as a table, from its ledger."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from equiloss.errors import ConfigError, printable
from equiloss.launching.console import plain
from equiloss.records.ledger import Attempt, Entry, Ledger
from equiloss.report.groups import brief_values, short_names


def line(sweep_dir: Path, attempt: str) -> str:
    """One line: jobs done, running, failed and left, the best so far, and the time left.

    Args:
        sweep_dir: The sweep's directory.
        attempt: Which attempt at the sweep.
    """
    ledger = Ledger(sweep_dir)
    begun = ledger.attempt(attempt)
    return "" if begun is None else _line(ledger, begun, ledger.newest(attempt))


def table(sweep_dir: Path) -> tuple[Table, str]:
    """A row for each job of the newest attempt at a sweep, and the line on all of them.

    Raises:
        ConfigError: if the directory is not a sweep's.
        RecordError: if its ledger cannot be read.
    """
    ledger = Ledger(sweep_dir)
    begun = ledger.attempt()
    if begun is None:
        raise ConfigError(
            f"{sweep_dir} holds no sweep: give the directory that `train.py -m` printed, which has "
            f"a {ledger.path.name}"
        )
    entries = ledger.newest(begun.attempt)
    best = _best(begun, entries)
    better = "higher" if begun.direction == "maximize" else "lower"
    title = f"{sweep_dir.resolve().name}: {begun.objective}, {better} is better"
    jobs = Table("job", title=plain(title), box=box.SIMPLE_HEAD)
    names, choices = short_names(begun.swept), _brief(entries)
    # A name that is cut short names nothing.
    for head in [*names.values()] or ["run"]:
        jobs.add_column(plain(head), overflow="fold")
    for head in ("status", begun.objective, "time"):
        jobs.add_column(plain(head))
    for entry in sorted(entries.values(), key=lambda entry: _place(begun, entry)):
        value = "" if entry.objective is None else f"{entry.objective:.4g}"
        seconds = time.time() - entry.time if entry.status == "running" else entry.seconds
        jobs.add_row(
            str(entry.job),
            *(plain(choices[entry.job].get(key, "")) for key in names),
            *([] if names else [plain(entry.directory)]),
            plain("completed earlier" if entry.skipped else entry.status),
            Text(f"{value} (best)", "bold") if entry == best else value,
            "" if entry.skipped or seconds is None else _duration(seconds),
        )
    return jobs, _line(ledger, begun, entries)


def summary(sweep_dir: Path) -> list[str]:
    """What was swept, and how to look at its best run and test it again."""
    ledger = Ledger(sweep_dir)
    begun = ledger.attempt()
    assert begun is not None
    entries = ledger.newest(begun.attempt)
    values = {key: {entry.choices.get(key) for entry in entries.values()} for key in begun.swept}
    swept = [f"{key} ({len(v)} value{'s' * (len(v) != 1)})" for key, v in values.items()]
    done = sum(entry.status == "completed" for entry in entries.values())
    lines = [f"swept: {', '.join(swept) or 'nothing'}; {done} of {len(entries)} runs completed"]
    best = _best(begun, entries)
    if best is not None:
        directory = sweep_dir / best.directory
        if Path.cwd() in directory.parents:
            directory = directory.relative_to(Path.cwd())
        setting = _setting(begun, best, entries)
        lines.append(f"best run{setting}: {directory}")
        # On the installed package there is no such file.
        program = "python train.py" if Path("train.py").is_file() else "equiloss train"
        lines.append(f"test that run: {program} task=test run={shlex.quote(str(directory))}")
    return lines


def _line(ledger: Ledger, begun: Attempt, entries: dict[int, Entry]) -> str:
    counts = {
        status: sum(entry.status == status for entry in entries.values())
        for status in ("completed", "running", "failed", "interrupted")
    }
    parts = [f"{counts['completed']} done", f"{counts['running']} running"]
    parts += [f"{counts[name]} {name}" for name in ("failed", "interrupted") if counts[name]]
    if begun.jobs:
        left = begun.jobs - len(entries)
        parts.append(f"{left} left")
        again = [entry for entry in entries.values() if not entry.skipped]
        # One that was interrupted is still to be done, and says nothing of how long that takes.
        ended = [entry for entry in again if entry.status in ("completed", "failed")]
        if left and ended:
            elapsed = time.time() - begun.began
            seconds = elapsed / len(ended) * (left + len(again) - len(ended))
            parts.append(f"about {_duration(seconds)} to go")
    best = _best(begun, entries)
    if best is not None:
        setting = _setting(begun, best, entries) or f" in {best.directory}"
        parts.append(f"best {begun.objective} {best.objective:.4g}{setting}")
    if damaged := ledger.damaged():
        parts.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} in {ledger.path.name}")
    return printable(f"sweep {ledger.path.parent.name}: {', '.join(parts)}")


def _brief(entries: dict[int, Entry]) -> dict[int, dict[str, str]]:
    """What was chosen for each job, in few digits."""
    briefly = brief_values([entry.choices for entry in entries.values()])
    return dict(zip(entries, briefly, strict=True))


def _setting(begun: Attempt, entry: Entry, entries: dict[int, Entry]) -> str:
    """What was chosen for a job, of the keys that vary: " (lr=0.1, seed=2)", or ""."""
    names, choices = short_names(begun.swept), _brief(entries)[entry.job]
    words = [f"{names[key]}={choices[key]}" for key in names if key in choices]
    return f" ({', '.join(words)})" if words else ""


def _best(begun: Attempt, entries: dict[int, Entry]) -> Entry | None:
    measured = [entry for entry in entries.values() if entry.objective is not None]
    return min(measured, key=lambda entry: _place(begun, entry), default=None)


def _place(begun: Attempt, entry: Entry) -> tuple[float, str]:
    """Jobs are sorted by it: the best objective first, those without one last, equal ones by name.

    The report names the first of equal settings too.
    """
    sign = -1 if begun.direction == "maximize" else 1
    objective = math.inf if entry.objective is None else sign * entry.objective
    return objective, entry.directory


def _duration(seconds: float) -> str:
    """A time to read.

    >>> [_duration(seconds) for seconds in (5, 90, 4000)]
    ['5 s', '2 min', '1.1 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
