"""Pairs of runs that should take the same steps, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from equiloss.config.resolved import leaves
from equiloss.report.groups import Kinship, differing, final_difference, relative
from equiloss.report.runs import Run, Series

FORMULATIONS = "formulations"
WORLD_SIZES = "world sizes"
PRECISION = "trainer.precision"


@dataclass
class Pair:
    """Two runs that should take the same steps."""

    what: str
    """What is held against what; the same for every seed and precision."""
    seed: Any
    kind: str
    """formulations | world sizes."""
    precision: str
    apart: Series
    """Relative difference of train/loss at each step that both runs have; not finite where one of
    the two losses is not."""
    steps: int
    """Steps that one or both of the runs have."""
    test_loss: float | None
    """Relative difference of the final test/loss; None where it was not measured."""
    other_bits: list[str] | None = None
    """What the bits depend on and the runs differ in; None where equal bits were not asked for."""

    @property
    def label(self) -> str:
        """What is held against what, and of which seed."""
        return f"{self.what}, seed {self.seed}"

    @property
    def worst_step(self) -> float | None:
        """Largest relative difference of a step; None for runs without a step in common."""
        return largest(value for _, value in self.apart)

    @property
    def worst(self) -> float | None:
        """Largest relative difference of a step or of the final test loss."""
        measured = [
            self.worst_step,
            largest([self.test_loss] if self.test_loss is not None else []),
        ]
        return max((value for value in measured if value is not None), default=None)

    @property
    def bitwise(self) -> bool:
        """Whether both have the same steps, and the loss of each step is the same float64."""
        return len(self.apart) == self.steps > 0 and all(value == 0 for _, value in self.apart)

    def first_beyond(self, bound: float) -> int | None:
        """The first step that differs by more than a bound."""
        return next((step for step, value in self.apart if not value <= bound), None)


def largest(values: Iterable[float]) -> float | None:
    """The largest of some differences; what is not finite is larger than any other.

    >>> largest([0.1, float("nan"), 0.2]), largest([0.1, 0.2]), largest([])
    (inf, 0.2, None)
    """
    return max((v if math.isfinite(v) else math.inf for v in values), default=None)


def find_pairs(kinship: Kinship) -> list[Pair]:
    """Completed runs that differ in the formulation alone, or in the number of devices alone.

    Formulations are the losses that the runs' own `parity.formulations` calls the same function.
    """
    completed = [run for run in kinship.runs if run.completed]
    written = [run for run in completed if run.loss in run.settings.get("parity.formulations", ())]
    pairs = []
    for other, first in _against_first(
        kinship.alike(written, "loss.name"),
        lambda run: (run.loss != "cross_entropy", run.loss),
    ):
        what = f"{other.loss} - {first.loss}{kinship.words(other, PRECISION)}"
        pairs.append(_pair(what, FORMULATIONS, other, first))
    for other, first in _against_first(
        kinship.alike(completed, "trainer.devices"),
        lambda run: (False, run.result.world_size),
    ):
        sizes = f"W={other.result.world_size} - W={first.result.world_size}"
        what = f"{other.loss}, {sizes}{kinship.words(other, 'trainer.devices', PRECISION)}"
        pairs.append(_pair(what, WORLD_SIZES, other, first))
    return pairs


def _against_first(
    sets: Iterable[list[Run]], rank: Callable[[Run], tuple[bool, Any]]
) -> Iterator[tuple[Run, Run]]:
    """Each run and the one of its set that it is held against."""
    for members in sets:
        first = min(members, key=rank)
        yield from ((other, first) for other in members if rank(other) != rank(first))


def _pair(what: str, kind: str, run: Run, reference: Run) -> Pair:
    found = run.metrics.get("train/loss", [])
    expected = dict(reference.metrics.get("train/loss", []))
    return Pair(
        what=what,
        seed=run.seed,
        kind=kind,
        precision=str(run.settings.get(PRECISION)),
        apart=[(step, relative(v, expected[step])) for step, v in found if step in expected],
        steps=len(expected.keys() | dict(found).keys()),
        test_loss=final_difference("test/loss", run, reference),
        other_bits=_other_bits(run, reference) if kind == WORLD_SIZES else None,
    )


def _other_bits(run: Run, reference: Run) -> list[str] | None:
    """Keys of the environment in which two runs with trainer.reduction=bitwise differ."""
    both = [dict(leaves(found.result.environment)) for found in (run, reference)]
    if not all(environment.get("shards") for environment in both):
        return None
    return list(differing(both))
