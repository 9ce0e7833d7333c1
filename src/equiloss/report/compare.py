"""Comparisons between runs, and the verdict: do the formulations match?"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equiloss.errors import PARITY_STOP
from equiloss.report.pairs import Pair, pairs_of, same_but, test_losses_apart
from equiloss.report.runs import Found, Run
from equiloss.resolved import PRESENTATION, leaves

# Separate runs of one function in float64: rounding at 1e-16, amplified by training.
FLOAT64_BOUND = 1e-9
SHOWN = ("test/acc", "test/balanced_acc", "test/nll", "test/loss", "test/ece", "val/nll")
TIMING = ("train_s", "samples_per_s")


@dataclass(frozen=True)
class Spread:
    """A figure over several runs."""

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
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass
class Group:
    """Runs that are the same in everything but their seed."""

    label: str
    runs: list[Run]

    def spread(self, name: str) -> Spread | None:
        """A final metric, or a figure of timing, over the group's completed runs."""
        values = [
            value
            for run in self.runs
            if run.completed
            and (value := run.result.metrics.get(name, run.result.timing.get(name))) is not None
        ]
        return Spread.of(values)

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        """Step, mean, smallest and largest value of a metric over the group's runs."""
        by_step: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            for step, value in run.metrics.get(name, []):
                by_step[step].append(value)
        return [(s, statistics.fmean(v), min(v), max(v)) for s, v in sorted(by_step.items())]


@dataclass
class Verdict:
    """Whether the formulations match, in each of the three ways."""

    word: str
    """match | differs | not checked."""
    lines: list[str]
    wrong: list[str]
    """What differs, by name."""


@dataclass
class Comparison:
    """Everything that the report says."""

    found: Found
    groups: list[Group]
    pairs: list[Pair]
    seeds: list[float]
    """Relative differences of the final test/loss between seeds of one group."""
    ratios: dict[str, float]
    """Largest error over its bound, of each formulation."""
    differing: dict[str, list[Any]]
    """Keys of the configuration that are not the same in all runs, with their values."""
    unasked: list[str]
    """Those of them that the sweep did not vary."""
    environments: dict[str, list[Any]]
    """What differs between the runs' environments."""
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        self.verdict = _verdict(self)

    @property
    def completed(self) -> list[Run]:
        """Runs that came to their end."""
        return [run for run in self.found.runs if run.completed]


def compare(found: Found) -> Comparison:
    """Compare every run that was found."""
    configs = {run.name: dict(leaves(run.config)) for run in found.runs}
    differing = _differing(configs.values())
    groups = _groups(found.runs, configs, differing)
    completed = [run for run in found.runs if run.completed]
    # Another loss than a formulation of cross-entropy has no reason to take the same steps.
    alike = [r for r in completed if r.loss in configs[r.name].get("parity.formulations", ())]
    return Comparison(
        found=found,
        groups=groups,
        pairs=[
            *pairs_of(alike, configs, "loss.name", "formulations"),
            *pairs_of(completed, configs, "trainer.devices", "world sizes"),
        ],
        seeds=[apart for group in groups for apart in _between_seeds(group)],
        ratios=_ratios(completed),
        differing=differing,
        unasked=_unasked(differing, found.swept),
        environments=_differing(
            [dict(leaves(run.result.environment)) for run in completed], leave_out=frozenset()
        ),
    )


def _differing(
    trees: Iterable[Mapping[str, Any]], leave_out: frozenset[str] = PRESENTATION
) -> dict[str, list[Any]]:
    trees = list(trees)
    keys = sorted({key for tree in trees for key in tree} - leave_out)
    values = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: _distinct(found) for key, found in values.items() if len(_distinct(found)) > 1}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _groups(
    runs: Sequence[Run], configs: Mapping[str, Mapping[str, Any]], differing: Mapping[str, Any]
) -> list[Group]:
    by_key: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_key[same_but(configs[run.name], {"seed"})].append(run)
    others = [key for key in differing if key not in ("seed", "loss.name")]
    made = []
    for members in by_key.values():
        config, loss = configs[members[0].name], members[0].loss
        varied = _differing(configs[run.name] for run in runs if run.loss == loss)
        # An option that other losses lack, and that is off in this one, says nothing.
        told = [
            f"{key}={config[key]}"
            for key in others
            if key in config and (key in varied or config[key] or not key.startswith("loss."))
        ]
        made.append(Group(", ".join([loss, *told]), members))
    return sorted(made, key=lambda group: group.label)


def _between_seeds(group: Group) -> list[float]:
    runs = [run for run in group.runs if run.completed]
    found = (test_losses_apart(a, b) for a, b in itertools.combinations(runs, 2))
    return [apart for apart in found if apart is not None]


def _formulations(run: Run) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in run.result.parity.items() if isinstance(found, dict)}


def _ratios(runs: Sequence[Run]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for run in runs:
        for name, found in _formulations(run).items():
            # A result holds null for what was not finite.
            ratio = math.inf if found["ratio"] is None else found["ratio"]
            worst[name] = max(worst.get(name, 0.0), ratio)
    return dict(sorted(worst.items()))


def _stopped_by_parity(run: Run) -> bool:
    """Whether a run with parity.policy=raise ended at a disagreement."""
    return not run.completed and (run.result.error or "").startswith(PARITY_STOP)


def _unasked(differing: Mapping[str, Any], swept: set[str] | None) -> list[str]:
    if swept is None:
        return []
    return [
        key
        for key in differing
        if not any(key == asked or key.startswith(f"{asked}.") for asked in swept)
    ]


def _verdict(comparison: Comparison) -> Verdict:
    lines, wrong = [], []
    checked = [run for run in comparison.completed if run.result.parity.get("steps")]
    stopped = [run for run in comparison.found.runs if _stopped_by_parity(run)]
    wrong += [f"{run.name} ({run.result.error})" for run in stopped]
    for run in checked:
        names = [name for name, found in _formulations(run).items() if not found["agree"]]
        if not names and not run.result.parity["agree"]:
            names = ["mass or all-reduced loss"]
        wrong += [f"{name} in {run.name}" for name in names]
    if stopped and not checked:
        lines.append(f"Lockstep: differs: {', '.join(wrong)}.")
    elif checked:
        steps = sum(run.result.parity["steps"] for run in checked)
        ratios = ", ".join(f"{name} {ratio:.2g}" for name, ratio in comparison.ratios.items())
        state = f"differs: {', '.join(wrong)}" if wrong else "match"
        lines.append(
            f"Lockstep (same logits, {steps} checks in {len(checked)} runs): {state}. Largest "
            f"error over its bound: {ratios}."
        )
    else:
        lines.append("Lockstep: not checked.")

    exact = [pair for pair in comparison.pairs if pair.precision == "64-true"]
    float64 = {pair.label: pair.worst for pair in exact if pair.worst is not None}
    beyond = [label for label, apart in float64.items() if not apart <= FLOAT64_BOUND]
    if float64:
        worst = max(float64.values())
        state = "differs" if beyond else "match"
        lines.append(
            f"Trajectories in float64 ({len(float64)} pairs of runs): {state}. Largest relative "
            f"difference {worst:.2g}, bound {FLOAT64_BOUND:g}."
        )
        wrong += [f"{label} (float64)" for label in beyond]
    else:
        lines.append("Trajectories in float64: not measured.")
    apart = [pair.label for pair in comparison.pairs if pair.worst is None]
    if apart:
        lines.append(f"Without a step or a test loss in common: {'; '.join(apart)}.")

    others = [pair for pair in comparison.pairs if pair.precision != "64-true"]
    drift = [pair.test_loss for pair in others if pair.test_loss is not None]
    if drift:
        beside = (
            f"between seeds {statistics.fmean(comparison.seeds):.2g} on average"
            if comparison.seeds
            else "no two seeds to compare with"
        )
        lines.append(
            f"Drift in lower precision (final test loss, {len(drift)} pairs): largest relative "
            f"difference {max(drift):.2g}; {beside}. Rounding that training amplifies: never "
            "judged."
        )
    for pair in comparison.pairs:
        if pair.other_bits is None or pair.bitwise or pair.worst is None:
            continue
        why = f"they differ in {', '.join(pair.other_bits)}" if pair.other_bits else "unexplained"
        lines.append(f"Other bits in spite of trainer.reduction=bitwise: {pair.label} ({why}).")
        if not pair.other_bits:
            wrong.append(f"{pair.label} (bits)")
    same = [pair.label for pair in comparison.pairs if pair.bitwise]
    if same:
        lines.append(f"Bitwise equal losses at every step: {'; '.join(same)}.")
    word = "differs" if wrong else ("match" if checked else "not checked")
    return Verdict(word, lines, wrong)
