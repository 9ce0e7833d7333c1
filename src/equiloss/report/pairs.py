"""Pairs of runs that should take the same steps, and the relative differences of their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from equiloss.config.resolved import leaves
from equiloss.report.groups import RunMatcher, differing, final_difference, relative
from equiloss.report.runs import Run, Series

FORMULATIONS = "formulations"
WORLD_SIZES = "world sizes"
PRECISION = "trainer.precision"


@dataclass
class Pair:
    """Two runs that should take the same steps."""

    name: str
    """Run and reference; the same for every seed and precision."""
    seed: Any
    kind: str
    """formulations | world sizes."""
    precision: str
    differences: Series
    """Relative difference of train/loss at each step that both runs have; not finite where one of
    the two losses is not."""
    of_steps: int
    """Steps that one or both of the runs have."""
    test_loss: float | None
    """Relative difference of the final test/loss; None where it was not measured."""
    causes: list[str] | None = None
    """Keys of the environment that the bits depend on and the runs differ in; None where equal
    bits were not asked for."""

    @property
    def label(self) -> str:
        """Run and reference, and their seed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Steps that both runs have."""
        return len(self.differences)

    @property
    def largest_of_steps(self) -> float | None:
        """Largest relative difference of a step; None for runs without a step in common."""
        return maximum(value for _, value in self.differences)

    @property
    def largest(self) -> float | None:
        """Largest relative difference of a step or of the final test loss."""
        test_loss = [] if self.test_loss is None else [self.test_loss]
        return maximum([*test_loss, *(value for _, value in self.differences)])

    @property
    def bitwise(self) -> bool:
        """Whether both have the same steps, and the loss of each step is the same float64."""
        return self.steps == self.of_steps and self.largest_of_steps == 0


def maximum(values: Iterable[float]) -> float | None:
    """The maximum; infinite if a value is not finite, None without values.

    >>> maximum([0.1, float("nan"), 0.2]), maximum([0.1, 0.2]), maximum([])
    (inf, 0.2, None)
    """
    return max((v if math.isfinite(v) else math.inf for v in values), default=None)


def first_beyond(series: Series, bound: float) -> int | None:
    """The first step at which a series is beyond a bound, or NaN; None if there is none."""
    return next((step for step, value in series if not value <= bound), None)


def find_pairs(matcher: RunMatcher) -> list[Pair]:
    """Completed runs that differ in the formulation alone, or in the number of devices alone.

    Formulations are the losses that the runs' own `parity.formulations` calls the same function.
    """
    completed = [run for run in matcher.runs if run.completed]
    same = [run for run in completed if run.loss in run.settings.get("parity.formulations", ())]
    # Kind, the one key in which its runs differ, candidates, and rank: lowest for the reference.
    kinds: tuple[tuple[str, str, list[Run], Callable[[Run], Any]], ...] = (
        (FORMULATIONS, "loss.name", same, lambda run: (run.loss != "cross_entropy", run.loss)),
        (WORLD_SIZES, "trainer.devices", completed, lambda run: run.result.world_size),
    )
    pairs = []
    for kind, key, candidates, rank in kinds:
        for runs in matcher.equal_but_for(key, candidates):
            reference = min(runs, key=rank)
            pairs += [
                _pair(kind, run, reference, matcher.distinction(run, key, PRECISION))
                for run in runs
                if rank(run) != rank(reference)
            ]
    return pairs


def _pair(kind: str, run: Run, reference: Run, distinction: str) -> Pair:
    name = f"{run.loss} - {reference.loss}"
    if kind == WORLD_SIZES:
        name = f"{run.loss}, W={run.result.world_size} - W={reference.result.world_size}"
    losses = run.metrics.get("train/loss", [])
    expected = dict(reference.metrics.get("train/loss", []))
    environments = [dict(leaves(each.result.environment)) for each in (run, reference)]
    # Shards are only in the environment of a run with trainer.reduction=bitwise.
    bitwise = kind == WORLD_SIZES and all(keys.get("shards") for keys in environments)
    return Pair(
        name=name + distinction,
        seed=run.seed,
        kind=kind,
        precision=str(run.settings.get(PRECISION)),
        differences=[(step, relative(v, expected[step])) for step, v in losses if step in expected],
        of_steps=len(expected.keys() | dict(losses).keys()),
        test_loss=final_difference("test/loss", run, reference),
        causes=list(differing(environments)) if bitwise else None,
    )
