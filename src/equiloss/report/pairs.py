"""Pairs of runs that should take the same steps, and how far they are apart."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equiloss.report.runs import Run, Series
from equiloss.resolved import PRESENTATION, leaves


def same_but(config: Mapping[str, Any], without: set[str]) -> str:
    """A configuration without some keys: equal for runs that differ in these alone."""
    kept = {k: v for k, v in config.items() if k not in without and k not in PRESENTATION}
    # An option of a loss that is off is as good as one that the loss does not have.
    on = {k: v for k, v in kept.items() if v or not k.startswith("loss.")}
    return json.dumps(on, sort_keys=True)


@dataclass
class Pair:
    """Two runs that should take the same steps."""

    label: str
    kind: str
    """formulations | world sizes."""
    precision: str
    apart: Series
    """Relative difference of train/loss by step."""
    test_loss: float | None
    """Relative difference of the final test/loss; None where it was not measured."""
    other_bits: list[str] | None = None
    """What the bits depend on and the runs differ in; None where equal bits were not asked for."""

    @property
    def worst(self) -> float | None:
        """Largest relative difference; None if the two have nothing in common."""
        test_loss = [] if self.test_loss is None else [self.test_loss]
        return max((*(value for _, value in self.apart), *test_loss), default=None)

    @property
    def bitwise(self) -> bool:
        """Whether every step's loss is the same float64."""
        return bool(self.apart) and all(value == 0 for _, value in self.apart)


def pairs_of(
    runs: Sequence[Run], configs: Mapping[str, Mapping[str, Any]], varied: str, kind: str
) -> list[Pair]:
    """Runs that are the same in everything but one key, each against the first of them."""
    alike: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        alike[same_but(configs[run.name], {varied})].append(run)
    pairs = []
    for members in alike.values():
        # The fused formulation, or one device, is what the others are held against.
        first = min(members, key=lambda run: (run.loss != "cross_entropy", run.result.world_size))
        for other in members:
            if other is first:
                continue
            config = configs[other.name]
            label = f"{other.loss} - {first.loss}, seed {config.get('seed')}"
            if kind == "world sizes":
                sizes = f"W={other.result.world_size} - W={first.result.world_size}"
                label = f"{other.loss}, {sizes}, seed {config.get('seed')}"
            pairs.append(
                Pair(
                    label,
                    kind,
                    str(config.get("trainer.precision")),
                    _apart(
                        other.metrics.get("train/loss", []), first.metrics.get("train/loss", [])
                    ),
                    test_losses_apart(other, first),
                    _other_bits(other, first) if kind == "world sizes" else None,
                )
            )
    return pairs


def _other_bits(run: Run, reference: Run) -> list[str] | None:
    """Keys of the environment in which two runs with trainer.reduction=bitwise differ."""
    both = [dict(leaves(found.result.environment)) for found in (run, reference)]
    if not all(environment.get("shards") for environment in both):
        return None
    return [key for key in both[0] if both[0][key] != both[1].get(key)]


def _apart(found: Series, reference: Series) -> Series:
    expected = dict(reference)
    return [(s, _difference(value, expected[s])) for s, value in found if s in expected]


def _difference(value: float, expected: float) -> float:
    """Relative difference; infinite where a value is not finite, and so beyond every bound.

    >>> _difference(1.5, 1.0), _difference(0.0, 0.0), _difference(math.nan, math.nan)
    (0.5, 0.0, inf)
    """
    if not (math.isfinite(value) and math.isfinite(expected)):
        return math.inf
    return abs(value - expected) / (abs(expected) or 1.0)


def test_losses_apart(run: Run, reference: Run) -> float | None:
    """Relative difference of two runs' final test/loss; None where one was not measured."""
    both = [found.result.metrics.get("test/loss", _UNKNOWN) for found in (run, reference)]
    if _UNKNOWN in both:
        return None
    # A result holds null for what was not finite.
    value, expected = (math.nan if loss is None else loss for loss in both)
    return _difference(value, expected)


_UNKNOWN: Any = object()
