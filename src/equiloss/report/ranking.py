"""Which setting is best in the objective, by how much, and whether seeds alone do as much."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equiloss.config.metrics import mode_of
from equiloss.report.groups import LARGEST, Group, Spread, differing, with_error

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond, Cornish & Fisher's
# expansion about the normal distribution's is right to 4 digits.
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


# What pictures a run is judged by. Its figures say nothing about runs that are judged by others.
DATA = (
    *("data.name", "data.target", "data.root", "data.table", "data.max_samples"),
    *("data.split_seed", "data.val_fraction", "data.test_fraction"),
)


@dataclass(frozen=True)
class Difference:
    """How much worse a setting is than another: mean and 95 % interval over seeds."""

    mean: float
    """In the metric's unit; positive where it is worse."""
    half_width: float | None
    """Of the interval, by Student's t; None where a setting has a single run."""

    def __str__(self) -> str:
        if not self.half_width:
            return f"{self.mean:+.3g}" + ("" if self.half_width is None else " ± 0")
        return with_error(self.mean, self.half_width, "+")

    def describe(self) -> str:
        """The difference, its interval, and whether it is more than chance, in words."""
        if self.half_width is None:
            return f"worse by {self.mean:.3g}; whether that is chance, several seeds would tell"
        sure = "more" if abs(self.mean) > self.half_width else "no more"
        apart = str(self).removeprefix("+")
        return f"worse by {apart} (95 % interval over seeds): {sure} than chance"


@dataclass(frozen=True)
class Ranked:
    """A setting's place in a ranking."""

    label: str
    spread: Spread | None
    """Of the objective over the completed runs."""
    behind: Difference | None
    """Difference to the best setting; None for that one, on other data, and where it is unknown."""

    def describe(self, objective: str) -> str:
        """The setting, its objective, and of how many seeds."""
        seeds = self.spread.runs if self.spread else 0
        figure = f"{self.label}: {objective} {self.spread}"
        return f"{figure} (mean and standard deviation of {seeds} seeds)" if seeds > 1 else figure


def best(groups: Sequence[Group], objective: str) -> list[str]:
    """Which setting is best, by how much, and how sure that is; nothing to say of a single one.

    Runs on different data have no best setting, and that is said instead.

    Args:
        groups: As `ranked`.
        objective: Name of the metric.
    """
    if differ := differing([_data(group) for group in groups]):
        values = (f"{key}: {', '.join(map(str, given))}" for key, given in differ.items())
        return [f"no best setting: runs are judged by different data ({'; '.join(values)})"]
    places = [place for place in ranking(groups, objective) if place.spread is not None]
    if len(places) < 2:
        return []
    lines = [f"best setting: {places[0].describe(objective)}"]
    behind = places[1].behind
    if behind is not None:
        said = behind.describe()
        if behind.half_width is None and str(places[0].spread) == str(places[1].spread):
            said = f"level to the digits shown ({behind.mean:.2g} apart)"
        lines.append(f"the next: {places[1].describe(objective)}; {said}")
    return lines


def objective_of(groups: Sequence[Group]) -> str:
    """The objective of most of the runs."""
    counts = Counter(str(run.settings.get("objective")) for group in groups for run in group.runs)
    return counts.most_common(1)[0][0]


def ranked(groups: Sequence[Group], objective: str) -> list[Group]:
    """Groups by the mean of the objective, the best first; those without a figure last."""
    sign = -1 if _mode(groups, objective) == "max" else 1

    def place(group: Group) -> float:
        spread = group.spread(objective)
        known = spread is not None and math.isfinite(spread.mean)
        return sign * spread.mean if known and spread is not None else math.inf

    return sorted(groups, key=place)


def ranking(groups: Sequence[Group], objective: str) -> list[Ranked]:
    """Each group of a ranking, with its difference to the first."""
    values = [_by_seed(group, objective) for group in groups]
    mode = _mode(groups, objective)
    behind = [
        difference(each, values[0], mode) if _data(group) == _data(groups[0]) else None
        for group, each in zip(groups, values, strict=True)
    ]
    return [
        Ranked(group.label, group.spread(objective), None if group is groups[0] else apart)
        for group, apart in zip(groups, behind, strict=True)
    ]


def _mode(groups: Sequence[Group], objective: str) -> str:
    """Which end of the objective is better, as the runs' own configurations have it."""
    name = objective.partition("/")[2]
    key = f"metrics.extra.{name}.mode"
    modes = [run.settings[key] for group in groups for run in group.runs if key in run.settings]
    return mode_of(objective, {name: {"mode": modes[0]}} if modes else None)


def _data(group: Group) -> dict[str, Any]:
    return {key: group.runs[0].settings.get(key) for key in DATA}


def _by_seed(group: Group, objective: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for run in group.completed:
        if abs(run.final.get(objective, math.nan)) < LARGEST:
            # A seed that a hand has written may be anything.
            values.setdefault(repr(run.seed), []).append(run.final[objective])
    return values


def difference(
    values: Mapping[Any, Sequence[float]], best: Mapping[Any, Sequence[float]], mode: str
) -> Difference | None:
    """How much worse values are than the best ones, both by seed and in the metric's unit.

    Args:
        values: One value for each run of a seed.
        best: The same of the best setting.
        mode: min | max, whether less or more is better.

    Where both have the same seeds, once each, their differences are taken seed by seed: the same
    weights to start from and the same order of samples are in both. Otherwise by Welch's interval
    (Welch, "The generalization of 'Student's' problem", Biometrika 34, 1947).

    >>> print(difference({0: [0.5], 1: [0.75]}, {0: [0.25], 1: [0.25]}, "min"))
    +0.4 ± 1.6
    >>> print(difference({0: [0.5]}, {0: [0.25]}, "max"))
    -0.25
    """
    if not values or not best:
        return None
    sign = 1 if mode == "min" else -1
    mine, theirs = ([v for several in each.values() for v in several] for each in (values, best))
    mean = sign * (statistics.fmean(mine) - statistics.fmean(theirs))
    if values.keys() == best.keys() and len(mine) == len(theirs) == len(values):
        if len(mine) == 1:
            return Difference(mean, None)
        apart = [values[seed][0] - best[seed][0] for seed in values]
        error, freedom = statistics.stdev(apart) / math.sqrt(len(apart)), len(apart) - 1.0
    elif min(len(mine), len(theirs)) == 1:
        return Difference(mean, None)
    else:
        parts = [(statistics.variance(v) / len(v), len(v) - 1) for v in (mine, theirs)]
        total = sum(part for part, _ in parts)
        error = math.sqrt(total)
        # Shares, since squares of large figures are infinite.
        freedom = 1 / sum((part / total) ** 2 / n for part, n in parts) if total else 1.0
    return Difference(mean, t975(freedom) * error)


def t975(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, rounded down to whole degrees of freedom.

    >>> round(t975(1.9), 2), round(t975(12), 3), round(t975(1e9), 4)
    (12.71, 2.179, 1.96)
    """
    whole = max(int(freedom), 1)
    if whole <= len(T975):
        return T975[whole - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / whole + second / whole**2 + third / whole**3
