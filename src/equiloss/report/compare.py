"""Comparison of runs: groups, pairs, differing keys and the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equiloss.config.resolved import PRESENTATION, leaves
from equiloss.records.run_dir import has_events
from equiloss.report.groups import Group, RunMatcher, differing
from equiloss.report.pairs import Pair, find_pairs
from equiloss.report.ranking import best, objective_of, ranked
from equiloss.report.runs import RunSet
from equiloss.report.sweeps import opaque_groups, unswept
from equiloss.report.verdict import Lockstep, Verdict, judge, largest_ratios, listed

FINAL_METRICS = ("test/acc", "test/balanced_acc", "test/nll", "test/loss", "test/ece", "val/nll")
TIMING = ("train_s", "samples_per_s")
# Folder of a report in which each run has a name to read.
LINKS = "tensorboard"


@dataclass
class Comparison:
    """Everything that the report says; report.json has the fields in this order."""

    verdict: Verdict
    ratios: dict[str, float]
    """Largest error over its bound, of each formulation; infinite where one was not finite."""
    objective: str
    """Metric by which the groups are sorted, the best first."""
    groups: list[Group]
    pairs: list[Pair]
    between_seeds: list[float]
    """Relative differences of the final test/loss between seeds of one group."""
    differing: dict[str, list[Any]]
    """Keys of the configuration that are not the same in all runs, with their values."""
    unasked: list[str]
    """Keys that differ between runs of one sweep, or of two, without being swept."""
    unsure: list[str]
    """Swept groups that may set any key, so that what else differs cannot be told."""
    repeated: list[str]
    """Runs with the configuration of another run of the same sweep."""
    environments: dict[str, list[Any]]
    """Keys of the environment that are not the same in all completed runs, with their values."""
    run_set: RunSet

    @property
    def final_metrics(self) -> list[str]:
        """What is shown of each group: what every run has, and the runs' own metrics."""
        settings = {key for group in self.groups for run in group.runs for key in run.settings}
        own = {key.split(".")[2] for key in settings if key.startswith("metrics.extra.")}
        return [*FINAL_METRICS, *(f"test/{name}" for name in sorted(own))]

    @property
    def careful(self) -> list[str]:
        """One line on keys that nobody has varied; nothing where there are none."""
        said = f"Careful: runs differ in more than was swept: {listed(self.unasked)}."
        return [said] if self.unasked else []

    def summary(self, directory: Path, verdict: Sequence[str]) -> list[str]:
        """What a screen says: the best setting, a verdict, and where the report lies."""
        tensorboard = shlex.join(["tensorboard", "--logdir", str(directory / LINKS)])
        looks = any(has_events(run.directory) for run in self.run_set.runs)
        return [
            *best(self.groups, self.objective),
            *verdict,
            f"report: {directory / 'report.md'}",
            *([f"curves: {tensorboard}"] if looks else []),
        ]


def compare(run_set: RunSet) -> Comparison:
    """Compare every run of a set."""
    runs = run_set.runs
    matcher = RunMatcher(runs)
    pairs, groups = find_pairs(matcher), matcher.groups()
    objective = objective_of(groups)
    groups = ranked(groups, objective)
    between_seeds = [value for group in groups for value in group.between_seeds("test/loss")]
    unasked, unsure = _unswept_keys(run_set)
    verdict = judge(runs, pairs, between_seeds)
    comparison = Comparison(
        verdict=verdict,
        ratios=largest_ratios([Lockstep.from_run(run) for run in runs]),
        objective=objective,
        groups=groups,
        pairs=pairs,
        between_seeds=between_seeds,
        differing=matcher.differing,
        unasked=unasked,
        unsure=unsure,
        repeated=matcher.repeated,
        environments=differing(dict(leaves(r.result.environment)) for r in runs if r.completed),
        run_set=run_set,
    )
    verdict.lines += comparison.careful
    return comparison


def _unswept_keys(run_set: RunSet) -> tuple[list[str], list[str]]:
    """Keys that differ within or between sweeps without being swept, and groups that hide them."""
    unasked, unsure = [], []
    within: set[str] = set()
    several = len(run_set.swept) > 1
    for sweep, swept in run_set.swept.items():
        settings = [run.settings for run in run_set.runs if run.sweep == sweep]
        if not settings:
            continue
        place = f" in {sweep}" if several else ""
        opaque = opaque_groups(swept, {key for tree in settings for key in tree})
        if opaque:
            unsure.append(f"{', '.join(opaque)}{place}: its choices may set any key")
        else:
            keys = unswept(swept, differing(settings, *PRESENTATION))
            within.update(keys)
            unasked += [f"{key}{place}" for key in keys]
    if several and not unsure:
        settings = [run.settings for run in run_set.runs if run.sweep in run_set.swept]
        keys = unswept(set().union(*run_set.swept.values()), differing(settings, *PRESENTATION))
        unasked += [f"{key} between sweeps" for key in keys if key not in within]
    return unasked, unsure
