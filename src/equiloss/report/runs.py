"""Finding run directories and reading what is in them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from equiloss.errors import UserError
from equiloss.results import CONFIG, EVALUATION, METRICS, RESULTS, Result

Series = list[tuple[int, float]]
"""Values of a metric by optimizer step."""


class ReportError(UserError):
    """Nothing to report on."""


@dataclass
class Run:
    """One run directory, as it was found."""

    name: str
    """Its path below the directory that was asked for, and as much above as tells it apart."""
    directory: Path
    config: dict[str, Any]
    result: Result
    metrics: dict[str, Series] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> str:
        """Name of the loss that trained."""
        return str(self.result.loss["name"])

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
    swept: set[str] | None
    """Keys that Hydra swept, where a multirun.yaml says so."""


def find(directories: Sequence[Path]) -> Found:
    """Read every run directory below some directories.

    Raises:
        ReportError: for a directory that is not there, or if there is no run.
    """
    found = Found([], {}, None)
    seen: set[Path] = set()
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"no directory {directory}")
        for multirun in sorted(directory.rglob("multirun.yaml")):
            found.swept = (found.swept or set()) | _swept_keys(multirun, found.skipped)
        places = {file.parent for file in directory.rglob(RESULTS)}
        places |= {file.parent for file in directory.rglob(CONFIG)}
        for place in sorted(places):
            if place.resolve() in seen:
                continue  # one of the directories lies in another
            seen.add(place.resolve())
            name = str(place.relative_to(directory)) if place != directory else place.name
            try:
                found.runs.append(_read(name, place))
            except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
                reason = str(error).partition("\n")[0]
                found.skipped[str(place)] = f"{type(error).__name__}: {reason}"
    if not found.runs:
        unread = "".join(f"; skipped {place} ({why})" for place, why in found.skipped.items())
        raise ReportError(f"no run below {', '.join(map(str, directories))}{unread}")
    _tell_apart(found.runs)
    return found


def _tell_apart(runs: Sequence[Run]) -> None:
    """Lengthen names that several runs have by the directories above them, until none has."""
    while True:
        counts = Counter(run.name for run in runs)
        same = [run for run in runs if counts[run.name] > 1]
        if not same:
            return
        for run in same:
            run.name = "/".join(run.directory.resolve().parts[-len(Path(run.name).parts) - 1 :])


def _read(name: str, place: Path) -> Run:
    config = yaml.load((place / CONFIG).read_text(encoding="utf-8"), Loader=_LOADER)
    if not isinstance(config, dict):
        raise TypeError(f"{CONFIG} holds no configuration")
    if (place / RESULTS).is_file():
        result = Result.read(place)
        result.loss["name"]  # every result has one
    else:
        # Killed before it could leave a word, or still at work.
        result = Result("unfinished", "", {"name": config["loss"]["name"], "options": {}})
    run = Run(name, place, config, result)
    if (place / METRICS).is_file():
        run.metrics = _read_metrics(place / METRICS)
    if (place / EVALUATION).is_file():
        run.evaluation = json.loads((place / EVALUATION).read_text(encoding="utf-8"))
    return run


# The C loader where there is one: a hundred configurations a second, or a thousand.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read_metrics(file: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.reader(lines)
        names = next(rows, [])
        for row in rows:
            if len(row) != len(names):
                continue  # the last line of a run that was killed while it wrote
            step = int(row[0])
            for name, text in zip(names[1:], row[1:], strict=True):
                if text:
                    found.setdefault(name, []).append((step, float(text)))
    return found


def _swept_keys(multirun: Path, skipped: dict[str, str]) -> set[str]:
    """Keys with several values in the command or the sweeper's parameters."""
    try:
        hydra: Mapping[str, Any] = yaml.load(multirun.read_text(encoding="utf-8"), Loader=_LOADER)
        hydra = hydra["hydra"]
        params = dict(hydra["sweeper"].get("params") or {})
        for text in hydra["overrides"]["task"]:
            key, _, value = str(text).lstrip("+").partition("=")
            params[key] = value
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        skipped[str(multirun)] = f"{type(error).__name__}: {error}".partition("\n")[0]
        return set()
    return {key for key, value in params.items() if _is_sweep(str(value))}


def _is_sweep(value: str) -> bool:
    """Whether an override's value stands for several.

    >>> [_is_sweep(text) for text in ("1,2", "[1,2]", "range(0,3)", "0.1")]
    [True, False, True, False]
    """
    depth = 0
    for character in value:
        depth += (character in "[{") - (character in "]}")
        if depth == 0 and character in ",(":
            return True
    return False
