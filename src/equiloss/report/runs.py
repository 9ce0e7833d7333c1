"""Finding run directories and reading what is in them."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException

from equiloss.config.resolved import leaves
from equiloss.errors import UserError
from equiloss.records.results import Result
from equiloss.records.run_dir import CONFIG, EVALUATION, METRICS, RESULTS
from equiloss.report.sweeps import MULTIRUN, sweep_of, swept_keys

Series = list[tuple[int, float]]
"""Values of a metric by optimizer step."""
# What reading a file of another form can raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError),
    *(yaml.YAMLError, HydraException),
)


class ReportError(UserError):
    """Nothing to report on, or no place for the report."""


@dataclass
class Run:
    """One run directory, as it was found."""

    name: str
    """Its path below the directory that was asked for; longer where two runs would share it."""
    directory: Path
    sweep: str
    """Name of the sweep that it belongs to, or of the directory that was asked for."""
    settings: dict[str, Any]
    """Its configuration by dotted key."""
    result: Result
    metrics: dict[str, Series] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> str:
        """Name of the loss that trained."""
        return str(self.result.loss["name"])

    @property
    def seed(self) -> Any:
        """Its seed."""
        return self.settings.get("seed")

    @property
    def completed(self) -> bool:
        """Whether it came to its end."""
        return self.result.status == "completed"


@dataclass
class Found:
    """Everything below the directories that were asked for."""

    runs: list[Run]
    skipped: dict[str, str]
    """What could not be read, and why."""
    swept: dict[str, set[str]]
    """Keys that Hydra varied, by the name of the sweep, where a multirun.yaml says so."""


def find(directories: Sequence[Path]) -> Found:
    """Read every run directory below some directories.

    Raises:
        ReportError: for a directory that is not there, or if there is no run.
    """
    found = Found([], {}, {})
    places = _places(directories)
    sweeps = {place: sweep_of(place) or root for place, root in places.items()}
    roots = sorted(set(sweeps.values()))
    sweep_names = dict(zip(roots, _told_apart(dict.fromkeys(roots, 1)), strict=True))
    depths = {place: len(place.relative_to(root).parts) for place, root in places.items()}
    for place, name in zip(places, _told_apart(depths), strict=True):
        try:
            run = _read(name, sweep_names[sweeps[place]], place)
        except UNREADABLE as error:
            found.skipped[str(place)] = _why(error)
        else:
            found.skipped |= _read_series(run)
            found.runs.append(run)
    if not found.runs:
        unread = "".join(f"; skipped {place} ({why})" for place, why in found.skipped.items())
        raise ReportError(f"no run below {', '.join(map(str, directories))}{unread}")
    for root in roots:
        if (root / MULTIRUN).is_file():
            try:
                found.swept[sweep_names[root]] = swept_keys(root / MULTIRUN)
            except UNREADABLE as error:
                found.skipped[str(root / MULTIRUN)] = _why(error)
    return found


def _places(directories: Sequence[Path]) -> dict[Path, Path]:
    """Run directories, each with the directory below which it was found first."""
    places: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"no directory {directory}")
        root = directory.resolve()
        for place, below, files in os.walk(root):
            # Hydra's own records, which are no runs, lie in `.hydra`.
            below[:] = sorted(name for name in below if not name.startswith("."))
            if RESULTS in files or CONFIG in files:
                places.setdefault(Path(place), root)
    return places


def _told_apart(depths: dict[Path, int]) -> list[str]:
    """The last parts of each path: as many as were asked for, and more until no two are the same.

    >>> _told_apart({Path("/x/a/run"): 1, Path("/x/b/run"): 1, Path("/x/b/other"): 1})
    ['a/run', 'b/run', 'other']
    """
    wanted = {path: max(depth, 1) for path, depth in depths.items()}
    while True:
        names = {path: "/".join(path.parts[-depth:]) for path, depth in wanted.items()}
        counts = Counter(names.values())
        shared = [path for path, name in names.items() if counts[name] > 1]
        if not shared:
            return list(names.values())
        for path in shared:
            wanted[path] += 1


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _read(name: str, sweep: str, place: Path) -> Run:
    config = yaml.load((place / CONFIG).read_text(encoding="utf-8"), Loader=_LOADER)
    if not isinstance(config, dict):
        raise TypeError(f"{CONFIG} holds no configuration")
    if (place / RESULTS).is_file():
        result = Result.read(place)
        _check(result)
    else:
        # Killed before it could leave a word, or still at work.
        result = Result("unfinished", "", {"name": config["loss"]["name"], "options": {}})
    return Run(name, place, sweep, dict(leaves(config)), result)


def _check(result: Result) -> None:
    """Refuse what only looks like a result: the comparison counts on these."""
    if result.status not in ("completed", "failed", "interrupted"):
        raise ValueError(f"{RESULTS}: unknown status {result.status!r}")
    numbers = [*result.metrics.values(), *result.timing.values(), result.world_size]
    formulations = [found for found in result.parity.values() if isinstance(found, dict)]
    if result.parity:
        numbers += [result.parity["steps"], result.parity["agree"]]
    for found in formulations:
        numbers += [found["ratio"], found["agree"]]
    for number in numbers:
        if not isinstance(number, int | float | None):
            raise TypeError(f"{RESULTS}: {number!r} is no number")
    dict(leaves(result.environment))
    result.loss["name"]  # every result has one


def _read_series(run: Run) -> dict[str, str]:
    """Read what a run logged; what could not be read, and why."""
    skipped = {}
    for name in (METRICS, EVALUATION):
        file = run.directory / name
        if not file.is_file():
            continue
        try:
            if name == METRICS:
                run.metrics = _read_metrics(file)
            else:
                run.evaluation = _read_evaluation(file)
        except UNREADABLE as error:
            skipped[str(file)] = _why(error)
    return skipped


# The C loader where there is one: a hundred configurations a second, or a thousand.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read_metrics(file: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the last line of a run that was killed while it wrote
    rows = csv.reader(lines)
    names = next(rows, [])
    for row in rows:
        step = int(row[0])
        for name, text in zip(names[1:], row[1:], strict=True):
            if text:
                found.setdefault(name, []).append((step, float(text)))
    return found


def _read_evaluation(file: Path) -> dict[str, Any]:
    """Confusion matrix and bins of calibration of each split, in the form that they should have."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    classes = len(found["class_names"])
    for split in found.keys() - {"class_names"}:
        confusion, bins = found[split]["confusion"], found[split]["calibration"]
        if confusion is not None and [len(row) for row in confusion] != [classes] * classes:
            raise ValueError(f"{split}: the confusion matrix is not one of {classes} classes")
        if len({len(bins[key]) for key in ("rows", "confidence", "right")}) != 1:
            raise ValueError(f"{split}: the bins of calibration do not belong together")
    return found
