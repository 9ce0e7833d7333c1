"""Groups of runs that differ in their seed alone, and statistics over them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equiloss.config.resolved import PRESENTATION
from equiloss.report.runs import Run

# The square of a larger one is infinite.
LARGEST = 1e150


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; NaN where the figure of one run is beyond float64."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single run."""
    runs: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread | None:
        """Mean and deviation of one value per run, or None without values.

        >>> Spread.from_values([1.0, 2.0, 3.0])
        Spread(mean=2.0, deviation=1.0, runs=3)
        """
        if not values:
            return None
        if not all(abs(value) < LARGEST for value in values):
            return cls(math.nan, None, len(values))
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        """The mean with its deviation, which has two digits.

        >>> print(Spread(0.98765, 0.0012, 3), "|", Spread(7386.2, 493.1, 2))
        0.9877 ± 0.0012 | 7386 ± 493
        >>> print(Spread(123.4, None, 1), "|", Spread(1e-9, 1e-10, 2))
        123.4 | 1e-09 ± 1e-10
        """
        if not math.isfinite(self.mean):
            return "not finite"
        if not self.deviation:
            return f"{self.mean:.4g}" + ("" if self.deviation is None else " ± 0")
        return with_error(self.mean, self.deviation)


def with_error(value: float, error: float, sign: str = "") -> str:
    """A value with its error, which has two digits, down to the same decimal.

    Args:
        value: Any finite number.
        error: Above 0.
        sign: "+" shows the value's sign always.

    >>> with_error(0.00499, 0.092, "+"), with_error(7386.2, 493.1), with_error(1e-9, 1e-10)
    ('+0.005 ± 0.092', '7386 ± 493', '1e-09 ± 1e-10')
    """
    decimals = max(1 - math.floor(math.log10(error)), 0)
    if decimals > 6:
        return f"{value:{sign}.4g} ± {error:.2g}"
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


@dataclass
class Group:
    """Runs that are the same in everything but their seed."""

    label: str
    runs: list[Run]

    @property
    def completed(self) -> list[Run]:
        """Runs with the status `completed`."""
        return [run for run in self.runs if run.completed]

    def spread(self, name: str) -> Spread | None:
        """Spread of a final metric, or a figure of timing, over the completed runs."""
        return Spread.from_values([run.final[name] for run in self.completed if name in run.final])

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        """Step, mean, smallest and largest value of a metric.

        Over the completed runs, so that a run that stopped early bends nothing; over all of them
        where none is completed.
        """
        by_step = values_by_step(self.completed or self.runs, name)
        # Not fmean, which raises where infinities cancel.
        return [(step, sum(v) / len(v), min(v), max(v)) for step, v in by_step]

    def between_seeds(self, name: str) -> list[float]:
        """Relative differences of a final metric between its completed runs of different seeds."""
        return [
            difference
            for a, b in itertools.combinations(self.completed, 2)
            if a.seed != b.seed and (difference := final_difference(name, a, b)) is not None
        ]


def values_by_step(runs: Iterable[Run], name: str) -> list[tuple[int, list[float]]]:
    """Values that some runs logged of a metric at each step, in the order of the steps."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, value in run.metrics.get(name, []):
            by_step[step].append(value)
    return sorted(by_step.items())


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; the absolute difference from 0.

    >>> relative(1.5, 1.0), relative(0.5, 0.0), relative(float("inf"), 1.0)
    (0.5, 0.5, inf)
    """
    return abs(value - reference) / (abs(reference) or 1.0)


def final_difference(name: str, run: Run, reference: Run) -> float | None:
    """Relative difference of a final metric: None if not measured, NaN if it is not finite."""
    value, expected = run.final.get(name), reference.final.get(name)
    return None if value is None or expected is None else relative(value, expected)


def differing(trees: Iterable[Mapping[str, Any]], *left_out: str) -> dict[str, list[Any]]:
    """The keys that are not the same in all mappings, each with its distinct values.

    >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}])
    {'b': [2, 3]}
    """
    trees = list(trees)
    keys = sorted({key for tree in trees for key in tree}.difference(left_out))
    distinct = {key: {_canonical(tree.get(key)): tree.get(key) for tree in trees} for key in keys}
    return {key: [*by_text.values()] for key, by_text in distinct.items() if len(by_text) > 1}


def _canonical(value: Any) -> str:
    """A value as text, the same for equal values."""
    return json.dumps(value, sort_keys=True)


class RunMatcher:
    """Finds runs whose configurations are equal but for one key, and what distinguishes others.

    Args:
        runs: Every run that is compared.

    Attributes:
        differing: Keys of the configuration that are not the same in all runs, with their values.
        repeated: Names of runs of the same configuration and the same sweep.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.differing = differing((run.settings for run in runs), *PRESENTATION)
        self._varied = {
            loss: differing(run.settings for run in runs if run.loss == loss)
            for loss in {run.loss for run in runs}
        }
        counts = Counter((self._key(run), run.sweep) for run in runs)
        self.repeated = [run.name for run in runs if counts[self._key(run), run.sweep] > 1]
        # Sweeps are kept apart if two of them hold the same configuration.
        self._by_sweep = len({key for key, _ in counts}) < len(counts)

    def _key(self, run: Run, without: str = "") -> str:
        """The configuration without one key, as text that is equal for equal configurations."""
        kept = {k: v for k, v in run.settings.items() if k not in {without, *PRESENTATION}}
        # An option of a loss that is off is as good as one that the loss does not have.
        return _canonical({k: v for k, v in kept.items() if v or not k.startswith("loss.")})

    def equal_but_for(self, key: str, runs: Iterable[Run]) -> list[list[Run]]:
        """Runs that are the same in everything but one key, in lists of their own."""
        matches: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in runs:
            matches[self._key(run, key), run.sweep if self._by_sweep else ""].append(run)
        return list(matches.values())

    def distinction(self, run: Run, *without: str) -> str:
        """Settings that distinguish a run, but for the loss's name, the seed and some keys.

        A key is shortened to its last part where no other setting has the same.
        """
        left_out = {"seed", "loss.name", *without}
        keys = [key for key in self.differing if key not in left_out and self._is_set(key, run)]
        names = short_names(keys)
        values = {key: _short(run.settings[key], self.differing[key]) for key in keys}
        parts = [f", {names[key]}={values[key]}" for key in keys]
        return "".join(parts) + (f" ({run.sweep})" if self._by_sweep else "")

    def _is_set(self, key: str, run: Run) -> bool:
        """Whether a run has a key, other than an option that is off in all runs of its loss."""
        return key in run.settings and (
            not key.startswith("loss.") or bool(run.settings[key]) or key in self._varied[run.loss]
        )

    def groups(self) -> list[Group]:
        """Groups of the runs that are the same in everything but their seed."""
        matches = self.equal_but_for("seed", self.runs)
        # The losses of one kind of run stand beside each other.
        matches.sort(key=lambda runs: (self.distinction(runs[0]), runs[0].loss))
        settings = brief_values([runs[0].choices for runs in matches])
        labels = [chosen(runs[0], choices) for runs, choices in zip(matches, settings, strict=True)]
        if "" in labels or len(set(labels)) < len(labels):
            labels = [runs[0].loss + self.distinction(runs[0]) for runs in matches]
        return [Group(label, runs) for label, runs in zip(labels, matches, strict=True)]


def chosen(run: Run, choices: Mapping[str, str]) -> str:
    """A run's setting as its sweep chose it, without the seed; "" where that is not known."""
    if not choices:
        return ""
    names = short_names(choices)
    others = {key: value for key, value in choices.items() if key not in ("loss", "seed")}
    words = [f"{names[key]}={value}" for key, value in others.items()]
    return ", ".join([choices.get("loss", run.loss), *words])


def brief_values(settings: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Values as typed, numbers in few digits where these tell them apart from the others.

    >>> brief_values([{"lr": "0.0123456789", "x": "0.123456"}, {"lr": "0.1", "x": "0.123457"}])
    [{'lr': '0.01235', 'x': '0.123456'}, {'lr': '0.1', 'x': '0.123457'}]
    """
    shown: dict[str, dict[str, str]] = {}
    for key in {key for choices in settings for key in choices}:
        values = {choices[key] for choices in settings if key in choices}
        brief = {value: _rounded(value) for value in values}
        counts = Counter(brief.values())
        shown[key] = {v: short if counts[short] == 1 else v for v, short in brief.items()}
    return [{key: shown[key][value] for key, value in choices.items()} for choices in settings]


def _rounded(text: str) -> str:
    """A number in at most four digits, where that is shorter; other text as it is."""
    try:
        return min(f"{float(text):.4g}", text, key=len)
    except ValueError:
        return text


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its last part, where no other has the same.

    >>> short_names(["optimizer.lr", "loss"]), short_names(["a.x", "b.x"])
    ({'optimizer.lr': 'lr', 'loss': 'loss'}, {'a.x': 'a.x', 'b.x': 'b.x'})
    """
    last = {key: key.replace("/", ".").rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: short if counts[short] == 1 else key for key, short in last.items()}


def _short(value: Any, others: Sequence[Any]) -> str:
    """A value in few digits, where they tell it apart from the others.

    >>> _short(0.0123456789, [0.0123456789, 0.5]), _short(0.12341, [0.12341, 0.12342])
    ('0.01235', '0.12341')
    """
    if not isinstance(value, float):
        return str(value)
    rounded = f"{value:.4g}"
    numbers = [other for other in others if isinstance(other, int | float)]
    return rounded if sum(f"{other:.4g}" == rounded for other in numbers) == 1 else str(value)
