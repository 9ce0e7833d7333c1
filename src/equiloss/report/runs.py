"""Search of directories for runs, and reading of their files."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equiloss.config.resolved import leaves, with_defaults
from equiloss.errors import RecordError, UserError
from equiloss.losses import registry
from equiloss.records.ledger import Ledger
from equiloss.records.reading import fits, read_json, read_text, read_yaml
from equiloss.records.results import Result
from equiloss.records.run_dir import (
    CONFIG,
    EVALUATION,
    LEDGER,
    METRICS,
    MULTIRUN,
    RESULTS,
    sweep_of,
)
from equiloss.report.sweeps import swept_keys

Series = list[tuple[int, float]]
"""Values of a metric by optimizer step."""
LOSS = "loss."
# Some hundred thousand rows; and the largest matrix that a run writes.
METRICS_MIB, MOST_CLASSES = 64, 100
BINS = ("rows", "confidence", "right")
COUNTS = {"confusion": list[list[int]] | None, "calibration": dict.fromkeys(BINS, list[float])}


class ReportError(UserError):
    """Nothing to report on, or no place for the report."""


@dataclass
class Run:
    """One run directory: configuration, results, logged metrics and evaluation."""

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
    choices: dict[str, str] = field(default_factory=dict)
    """What its sweep chose for it: values of the swept keys and groups, as typed."""

    @property
    def loss(self) -> str:
        """Name of the loss that trained."""
        return str(self.result.loss["name"])

    @property
    def seed(self) -> Any:
        """Random seed of the configuration."""
        return self.settings.get("seed")

    @property
    def completed(self) -> bool:
        """Whether its status is `completed`."""
        return self.result.status == "completed"

    @property
    def final(self) -> dict[str, float]:
        """Final metrics and timing by name; NaN where one is not finite (null in the file)."""
        figures: dict[str, float | None] = {**self.result.timing, **self.result.metrics}
        return {name: math.nan if value is None else value for name, value in figures.items()}


@dataclass
class RunSet:
    """The runs below some directories, and what could not be read there."""

    runs: list[Run]
    skipped: dict[str, str]
    """Paths that could not be read, and why."""
    swept: dict[str, set[str]]
    """Keys that Hydra varied, by the name of the sweep, where a multirun.yaml says so."""


def find_runs(directories: Sequence[Path]) -> RunSet:
    """Read every run directory below some directories.

    Raises:
        ReportError: for a directory that is not there, or if there is no run.
    """
    run_set = RunSet([], {}, {})
    roots = _run_directories(directories)
    sweeps = {place: sweep_of(place) or root for place, root in roots.items()}
    sweep_names = _unique_names(dict.fromkeys(sorted(set(sweeps.values())), 1))
    depths = {place: len(place.relative_to(root).parts) or 1 for place, root in roots.items()}
    for place, name in _unique_names(depths).items():
        sweep = sweep_names[sweeps[place]]
        with _skip_unreadable(place, run_set.skipped, "the run is left out"):
            run_set.runs.append(_read_run(place, name, sweep, run_set.skipped))
    if not run_set.runs:
        unread = "".join(f"; skipped {place} ({why})" for place, why in run_set.skipped.items())
        raise ReportError(f"no run below {', '.join(map(str, directories))}{unread}")
    _complete_losses(run_set.runs)
    for directory, name in sweep_names.items():
        multirun = directory / MULTIRUN
        if os.path.lexists(multirun):
            with _skip_unreadable(multirun, run_set.skipped, "what was swept is unknown"):
                run_set.swept[name] = swept_keys(multirun)
        if os.path.lexists(directory / LEDGER):
            with _skip_unreadable(
                directory / LEDGER, run_set.skipped, "what was chosen is unknown"
            ):
                chosen = Ledger(directory).choices()
                for run in run_set.runs:
                    if run.sweep == name:
                        run.choices = chosen.get(os.path.relpath(run.directory, directory), {})
    return run_set


def _complete_losses(runs: Sequence[Run]) -> None:
    """Give the runs of a loss the options that some of them are too old to have."""
    by_loss: dict[str, list[Run]] = {}
    for run in runs:
        by_loss.setdefault(run.loss, []).append(run)
    for same_loss in by_loss.values():
        stored = [
            {key.removeprefix(LOSS): v for key, v in run.settings.items() if key.startswith(LOSS)}
            for run in same_loss
        ]
        if all(options.keys() == stored[0].keys() for options in stored):
            continue  # the loss, and torch with it, need not be imported
        for run, options in zip(same_loss, stored, strict=True):
            completed = registry.with_defaults(options).items()
            run.settings |= {LOSS + key: value for key, value in completed}


def _run_directories(directories: Sequence[Path]) -> dict[Path, Path]:
    """Run directories, each with the given directory below which it was found first."""
    roots: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"no directory {directory}")
        root = directory.resolve()
        for place, below, files in os.walk(root):
            # Hydra's own records, which are no runs, lie in `.hydra`.
            below[:] = sorted(name for name in below if not name.startswith("."))
            if RESULTS in files or CONFIG in files:
                roots.setdefault(Path(place), root)
    return roots


def _unique_names(depths: dict[Path, int]) -> dict[Path, str]:
    """The last parts of each path: as many as its depth, and more until no two are the same.

    >>> names = _unique_names({Path("/x/a/run"): 1, Path("/x/b/run"): 1, Path("/x/b/other"): 1})
    >>> list(names.values())
    ['a/run', 'b/run', 'other']
    """
    names = {path: "/".join(path.parts[-depth:]) for path, depth in depths.items()}
    counts = Counter(names.values())
    longer = {path: depths[path] + 1 for path, name in names.items() if counts[name] > 1}
    return _unique_names(depths | longer) if longer else names


@contextmanager
def _skip_unreadable(path: Path, skipped: dict[str, str], lost: str) -> Iterator[None]:
    """Record in `skipped` why a path cannot be read and what is lost by it, instead of raising."""
    try:
        yield
    except RecordError as error:
        what = "" if error.file == path else f"{error.file.name} "
        skipped[str(path)] = f"{what}{error.why}: {lost} until that file is mended or removed"


def _read_run(place: Path, name: str, sweep: str, skipped: dict[str, str]) -> Run:
    """Read a run directory; metrics or an evaluation that cannot be read are skipped."""
    config = read_yaml(place / CONFIG)
    if not fits(config, {"loss": {"name": str}}):
        raise RecordError(place / CONFIG, "names no loss")
    if os.path.lexists(place / RESULTS):
        result = Result.read(place)
    else:
        # Killed before it could leave a word, or still at work.
        result = Result("unfinished", "", {"name": config["loss"]["name"], "options": {}})
    run = Run(name, place, sweep, dict(leaves(with_defaults(config))), result)
    if not fits(run.settings.get("parity.formulations", []), list[str]):
        raise RecordError(place / CONFIG, "has parity.formulations that are no list of names")
    metrics, evaluation = place / METRICS, place / EVALUATION
    if os.path.lexists(metrics):
        with _skip_unreadable(metrics, skipped, "the run's curves are left out"):
            run.metrics = _read_metrics(metrics)
    if os.path.lexists(evaluation):
        with _skip_unreadable(evaluation, skipped, "its matrix and calibration are left out"):
            run.evaluation = _read_evaluation(evaluation)
    return run


def _read_metrics(file: Path) -> dict[str, Series]:
    """Every logged metric by name."""
    metrics: dict[str, Series] = {}
    lines = read_text(file, METRICS_MIB).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the last line of a run that was killed while it wrote
    rows = csv.reader(lines)
    try:
        names = next(rows, [])
        if names[:1] not in ([], ["step"]):
            raise ValueError(names)
        for row in rows:
            step = int(row[0])
            for name, text in zip(names[1:], row[1:], strict=True):
                if text:
                    metrics.setdefault(name, []).append((step, float(text)))
            if not 0 <= step < 1 << 63:
                raise ValueError(step)
    except (ValueError, IndexError, csv.Error) as error:
        raise RecordError(file, f"has no row of numbers in line {rows.line_num}") from error
    return metrics


def _read_evaluation(file: Path) -> dict[str, Any]:
    """Confusion matrix and calibration bins of each split, checked for their shapes."""
    evaluation = read_json(file)
    if not fits(evaluation, {"class_names": list[str]}):
        raise RecordError(file, "has no names of classes")
    classes = len(evaluation["class_names"])
    for split in evaluation.keys() - {"class_names"}:
        if not fits(evaluation[split], COUNTS):
            raise RecordError(file, f"has no counts of {split}")
        confusion, bins = evaluation[split]["confusion"], evaluation[split]["calibration"]
        sizes = [classes] if confusion is None else [len(confusion), *map(len, confusion)]
        if {*sizes} != {classes} or (confusion and classes > MOST_CLASSES):
            raise RecordError(file, f"has a matrix of {split} that is not one of its classes")
        if len({len(bins[key]) for key in BINS}) != 1:
            raise RecordError(file, f"has bins of {split} that do not belong together")
    return dict(evaluation)
