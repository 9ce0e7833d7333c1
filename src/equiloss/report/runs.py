"""Search of directories for runs, and reading of their files."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from yaml import YAMLError

from equiloss.config.resolved import leaves, with_defaults
from equiloss.errors import UserError
from equiloss.losses import registry
from equiloss.records.results import Result
from equiloss.records.run_dir import CONFIG, EVALUATION, METRICS, MULTIRUN, RESULTS, sweep_of
from equiloss.report.sweeps import swept_keys

Series = list[tuple[int, float]]
"""Values of a metric by optimizer step."""
LOSS = "loss."
# What reading a file of another form can raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError),
    *(csv.Error, YAMLError, HydraException),
)
# The C loader where there is one: a hundred configurations a second, or a thousand.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
        with _skip_unreadable(place, run_set.skipped):
            run_set.runs.append(_read_run(place, name, sweep, run_set.skipped))
    if not run_set.runs:
        unread = "".join(f"; skipped {place} ({why})" for place, why in run_set.skipped.items())
        raise ReportError(f"no run below {', '.join(map(str, directories))}{unread}")
    _complete_losses(run_set.runs)
    for directory, name in sweep_names.items():
        multirun = directory / MULTIRUN
        if multirun.is_file():
            with _skip_unreadable(multirun, run_set.skipped):
                run_set.swept[name] = swept_keys(multirun)
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
def _skip_unreadable(path: Path, skipped: dict[str, str]) -> Iterator[None]:
    """Record in `skipped` why a path cannot be read, instead of raising."""
    try:
        yield
    except UNREADABLE as error:
        message, _, _ = str(error).partition("\n")
        skipped[str(path)] = f"{type(error).__name__}: {message}"


def _read_run(place: Path, name: str, sweep: str, skipped: dict[str, str]) -> Run:
    """Read a run directory; metrics or an evaluation that cannot be read are skipped."""
    config = yaml.load((place / CONFIG).read_text(encoding="utf-8"), Loader=_LOADER)
    if not isinstance(config, dict):
        raise TypeError(f"{CONFIG} holds no configuration")
    if (place / RESULTS).is_file():
        result = Result.read(place)
        _validate(result)
    else:
        # Killed before it could leave a word, or still at work.
        result = Result("unfinished", "", {"name": config["loss"]["name"], "options": {}})
    run = Run(name, place, sweep, dict(leaves(with_defaults(config))), result)
    metrics, evaluation = place / METRICS, place / EVALUATION
    if metrics.is_file():
        with _skip_unreadable(metrics, skipped):
            run.metrics = _read_metrics(metrics)
    if evaluation.is_file():
        with _skip_unreadable(evaluation, skipped):
            run.evaluation = _read_evaluation(evaluation)
    return run


def _validate(result: Result) -> None:
    """Refuse what only looks like a result: the comparison counts on these fields."""
    if result.status not in ("completed", "failed", "interrupted"):
        raise ValueError(f"{RESULTS}: unknown status {result.status!r}")
    numbers = [*result.metrics.values(), *result.timing.values(), result.world_size]
    if result.parity:
        numbers += [result.parity["steps"], result.parity["agree"]]
    for agreement in result.parity.values():
        if isinstance(agreement, dict):
            numbers += [agreement["ratio"], agreement["agree"]]
    for number in numbers:
        if not isinstance(number, int | float | None):
            raise TypeError(f"{RESULTS}: {number!r} is no number")
    dict(leaves(result.environment))
    result.loss["name"]  # every result has one


def _read_metrics(file: Path) -> dict[str, Series]:
    """Every logged metric by name."""
    metrics: dict[str, Series] = {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the last line of a run that was killed while it wrote
    rows = csv.reader(lines)
    names = next(rows, [])
    for row in rows:
        step = int(row[0])
        for name, text in zip(names[1:], row[1:], strict=True):
            if text:
                metrics.setdefault(name, []).append((step, float(text)))
    return metrics


def _read_evaluation(file: Path) -> dict[str, Any]:
    """Confusion matrix and calibration bins of each split, checked for their shapes."""
    evaluation: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    classes = len(evaluation["class_names"])
    for split in evaluation.keys() - {"class_names"}:
        confusion, bins = evaluation[split]["confusion"], evaluation[split]["calibration"]
        if confusion is not None and [len(row) for row in confusion] != [classes] * classes:
            raise ValueError(f"{split}: the confusion matrix is not one of {classes} classes")
        if len({len(bins[key]) for key in ("rows", "confidence", "right")}) != 1:
            raise ValueError(f"{split}: the bins of calibration do not belong together")
    return evaluation
