"""Which runs belong together, and a figure over several of them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equiloss.config.resolved import PRESENTATION
from equiloss.report.runs import Run


@dataclass(frozen=True)
class Spread:
    """A figure over several runs; NaN where it is not finite in one of them."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single run."""
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Mean and deviation, or None without values.

        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(mean=2.0, deviation=1.0, runs=3)
        """
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            return cls(math.nan, None, len(values))
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass
class Group:
    """Runs that are the same in everything but their seed."""

    label: str
    runs: list[Run]

    @property
    def completed(self) -> list[Run]:
        """Those that came to their end."""
        return [run for run in self.runs if run.completed]

    def spread(self, name: str) -> Spread | None:
        """A final metric, or a figure of timing, over the group's completed runs."""
        values = []
        for run in self.completed:
            known: Mapping[str, float | None] = run.result.timing | run.result.metrics
            if name in known:
                value = known[name]
                values.append(math.nan if value is None else value)
        return Spread.of(values)

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        """Step, mean, smallest and largest value of a metric.

        Over the completed runs, so that a run that stopped early bends nothing; over all of them
        where none is completed.
        """
        by_step: dict[int, list[float]] = defaultdict(list)
        for run in self.completed or self.runs:
            for step, value in run.metrics.get(name, []):
                by_step[step].append(value)
        return [(s, statistics.fmean(v), min(v), max(v)) for s, v in sorted(by_step.items())]

    def between_seeds(self, name: str) -> list[float]:
        """Relative differences of a final metric between its completed runs of different seeds."""
        return [
            apart
            for a, b in itertools.combinations(self.completed, 2)
            if a.seed != b.seed and (apart := final_difference(name, a, b)) is not None
        ]


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; the absolute difference from 0.

    >>> relative(1.5, 1.0), relative(0.5, 0.0), relative(float("inf"), 1.0)
    (0.5, 0.5, inf)
    """
    return abs(value - reference) / (abs(reference) or 1.0)


def final_difference(name: str, run: Run, reference: Run) -> float | None:
    """Relative difference of a final metric: None if not measured, NaN if it is not finite."""
    metrics, expected = run.result.metrics, reference.result.metrics
    if name not in metrics or name not in expected:
        return None
    value, other = metrics[name], expected[name]
    return math.nan if value is None or other is None else relative(value, other)


def differing(
    trees: Iterable[Mapping[str, Any]], leave_out: frozenset[str] = frozenset()
) -> dict[str, list[Any]]:
    """The keys that are not the same everywhere, each with its distinct values.

    >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}])
    {'b': [2, 3]}
    """
    trees = list(trees)
    keys = sorted({key for tree in trees for key in tree} - leave_out)
    values = {key: _distinct(tree.get(key) for tree in trees) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({_text(value): value for value in values}.values())


def _text(value: Any) -> str:
    # A date is the one thing that YAML knows and JSON does not.
    return json.dumps(value, sort_keys=True, default=str)


@dataclass
class Kinship:
    """When runs are the same but for one key, and what tells the others apart.

    Args:
        runs: Every run that is compared.
    """

    runs: Sequence[Run]
    differing: dict[str, list[Any]] = field(init=False)
    """Keys of the configuration that are not the same in all runs, with their values."""
    by_sweep: bool = field(init=False)
    """Whether sweeps are kept apart, because two of them hold the same configuration."""
    repeated: list[str] = field(init=False)
    """Runs of the same configuration and the same sweep."""

    def __post_init__(self) -> None:
        self.differing = differing((run.settings for run in self.runs), PRESENTATION)
        self._varied = {
            loss: differing(run.settings for run in self.runs if run.loss == loss)
            for loss in {run.loss for run in self.runs}
        }
        places: dict[str, list[str]] = defaultdict(list)
        for run in self.runs:
            places[self._key(run)].append(run.sweep)
        self.by_sweep = any(len(set(sweeps)) > 1 for sweeps in places.values())
        counts = Counter((self._key(run), run.sweep) for run in self.runs)
        self.repeated = [run.name for run in self.runs if counts[self._key(run), run.sweep] > 1]

    def _key(self, run: Run, without: str = "") -> str:
        kept = {k: v for k, v in run.settings.items() if k not in {without, *PRESENTATION}}
        # An option of a loss that is off is as good as one that the loss does not have.
        return _text({k: v for k, v in kept.items() if v or not k.startswith("loss.")})

    def alike(self, runs: Iterable[Run], without: str) -> list[list[Run]]:
        """Runs that are the same in everything but one key, in lists of their own."""
        found: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in runs:
            found[self._key(run, without), run.sweep if self.by_sweep else ""].append(run)
        return list(found.values())

    def words(self, run: Run, *without: str) -> str:
        """What tells a run apart from others, but for the loss's name, the seed and some keys."""
        told = [
            key
            for key in self.differing
            if key not in {"seed", "loss.name", *without} and self._says_something(key, run)
        ]
        last = Counter(key.rpartition(".")[2] for key in told)
        parts = []
        for key in told:
            _, _, short = key.rpartition(".")
            value = _short(run.settings[key], self.differing[key])
            parts.append(f", {short if last[short] == 1 else key}={value}")
        return "".join(parts) + (f" ({run.sweep})" if self.by_sweep else "")

    def _says_something(self, key: str, run: Run) -> bool:
        """Not so an option that other losses lack, and that is off in all runs of this one."""
        if key not in run.settings:
            return False
        on = not key.startswith("loss.") or bool(run.settings[key])
        return on or key in self._varied[run.loss]

    def groups(self) -> list[Group]:
        """The runs by everything but their seed."""
        made = [(self.words(found[0]), found) for found in self.alike(self.runs, "seed")]
        # The losses of one kind of run stand beside each other.
        made.sort(key=lambda entry: (entry[0], entry[1][0].loss))
        return [Group(found[0].loss + words, found) for words, found in made]


def _short(value: Any, others: Sequence[Any]) -> str:
    """A value in few digits, where they tell it apart from the others.

    >>> _short(0.0123456789, [0.0123456789, 0.5]), _short(0.12341, [0.12341, 0.12342])
    ('0.01235', '0.12341')
    """
    if not isinstance(value, float):
        return str(value)
    shown = f"{value:.4g}"
    numbers = [other for other in others if isinstance(other, int | float)]
    return shown if sum(f"{other:.4g}" == shown for other in numbers) == 1 else str(value)
