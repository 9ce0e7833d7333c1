"""Everything that runs have in common, and in what they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from equiloss.config.resolved import PRESENTATION, leaves
from equiloss.report.groups import Group, Kinship, differing
from equiloss.report.pairs import Pair, find_pairs
from equiloss.report.runs import Found, Run
from equiloss.report.sweeps import opaque, unasked
from equiloss.report.verdict import Lockstep, Verdict, judge, largest_ratios, listed

SHOWN = ("test/acc", "test/balanced_acc", "test/nll", "test/loss", "test/ece", "val/nll")
TIMING = ("train_s", "samples_per_s")


@dataclass
class Comparison:
    """Everything that the report says."""

    found: Found
    groups: list[Group]
    pairs: list[Pair]
    seeds: list[float]
    """Relative differences of the final test/loss between seeds of one group."""
    ratios: dict[str, float]
    """Largest error over its bound, of each formulation; infinite where one was not finite."""
    differing: dict[str, list[Any]]
    """Keys of the configuration that are not the same in all runs, with their values."""
    unasked: list[str]
    """Keys that differ between runs of one sweep, or of two, without being swept."""
    unsure: list[str]
    """Sweeps of which that cannot be said, and why."""
    repeated: list[str]
    """Runs of one sweep that another one has the configuration of."""
    environments: dict[str, list[Any]]
    """What differs between the runs' environments."""
    verdict: Verdict

    @property
    def completed(self) -> list[Run]:
        """Runs that came to their end."""
        return [run for run in self.found.runs if run.completed]


def compare(found: Found) -> Comparison:
    """Compare every run that was found."""
    kinship = Kinship(found.runs)
    groups, pairs = kinship.groups(), find_pairs(kinship)
    seeds = [apart for group in groups for apart in group.between_seeds("test/loss")]
    not_asked, unsure = _beside_the_sweeps(found)
    verdict = judge(found.runs, pairs, seeds)
    if not_asked:
        keys = listed(not_asked)
        verdict.lines.append(f"Careful: runs differ in more than was swept: {keys}.")
    return Comparison(
        found=found,
        groups=groups,
        pairs=pairs,
        seeds=seeds,
        ratios=largest_ratios(map(Lockstep.of, found.runs)),
        differing=kinship.differing,
        unasked=not_asked,
        unsure=unsure,
        repeated=kinship.repeated,
        environments=differing(
            dict(leaves(run.result.environment)) for run in found.runs if run.completed
        ),
        verdict=verdict,
    )


def _beside_the_sweeps(found: Found) -> tuple[list[str], list[str]]:
    """Keys in which runs differ unasked, within a sweep or between two, and what hides them."""
    told, unsure = [], []
    within: set[str] = set()
    several = len(found.swept) > 1
    for sweep, swept in found.swept.items():
        settings = [run.settings for run in found.runs if run.sweep == sweep]
        if not settings:
            continue
        place = f" in {sweep}" if several else ""
        anything = opaque(swept, {key for tree in settings for key in tree})
        if anything:
            unsure.append(f"{', '.join(anything)}{place}: its choices may set any key")
        else:
            keys = unasked(swept, differing(settings, PRESENTATION))
            within.update(keys)
            told += [f"{key}{place}" for key in keys]
    if several and not unsure:
        settings = [run.settings for run in found.runs if run.sweep in found.swept]
        keys = unasked(set().union(*found.swept.values()), differing(settings, PRESENTATION))
        told += [f"{key} between sweeps" for key in keys if key not in within]
    return told, unsure
