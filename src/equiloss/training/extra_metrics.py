"""Metrics by configuration, `metrics.extra`, the same numbers on any number of ranks."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from equiloss.config.checks import require
from equiloss.config.metrics import torchmetrics_class
from equiloss.distributed import collectives
from equiloss.errors import ConfigError, first_line
from equiloss.imports import import_target

# Keys of an entry that are no keyword arguments.
OURS = ("name", "target", "mode")

log = logging.getLogger(__name__)


class ExtraMetrics:
    """Metrics of torchmetrics' kind, each of which sees the whole evaluation on every rank.

    torchmetrics adds or joins the states of ranks, which is right for some metrics (sums), and
    wrong for others (a mean of means, a rank without a row). So the rows of each evaluation batch
    are gathered first: whatever a metric does, it does it as on one device.

    Args:
        extra: By name, `name` (of torchmetrics.classification, without Multiclass) or `target`
            (package.module:Class, code by design), and keyword arguments.
        num_classes: K.

    Raises:
        ConfigError: naming the metric that is unknown, cannot be made, or gives no single number.

    >>> metrics = ExtraMetrics({"f1": {"name": "F1Score", "average": "macro"}}, num_classes=3)
    >>> metrics.update(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> {name: round(value, 4) for name, value in metrics.take().items()}
    {'f1': 0.5556}
    """

    def __init__(self, extra: Mapping[str, Any], num_classes: int) -> None:
        self.metrics = {name: _build(name, extra[name], num_classes) for name in extra}
        self._broken: set[str] = set()

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add this rank's rows of a batch: probabilities [n, K] and classes [n]; n may be 0.

        Every rank must call it.
        """
        if not self.metrics:
            return
        probabilities = collectives.gather_rows(probabilities)
        target = collectives.gather_rows(target)
        if len(target):
            for name, metric in self.metrics.items():
                with self._survived(name):
                    # Of which a metric would take the first for the most probable.
                    known = not probabilities.isnan().any()
                    require(known, "the probabilities of some rows are NaN")
                    metric.to(probabilities.device).update(probabilities, target)

    def take(self) -> dict[str, float]:
        """Each metric over what was added, which is then forgotten; NaN where there is none."""
        values = dict.fromkeys(self.metrics, math.nan)
        for name, metric in self.metrics.items():
            if metric.update_called and name not in self._broken:
                with self._survived(name):
                    values[name] = float(metric.compute())
            metric.reset()
        self._broken.clear()
        return values

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        """No figure ends a run: one that fails is not measured, and is said to be."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:  # foreign code may fail in any way
            if name not in self._broken:
                log.warning("metrics.extra.%s cannot be measured: %s", name, first_line(error))
            self._broken.add(name)


def _build(name: str, entry: Mapping[str, Any], num_classes: int) -> Metric:
    place = f"metrics.extra.{name}"
    options = {key: value for key, value in entry.items() if key not in OURS}
    if "target" in entry:
        kind: Any = import_target(str(entry["target"]), f"{place}.target", ConfigError)
    else:
        kind = torchmetrics_class(place, str(entry["name"]))
    called = entry.get("target") or entry["name"]
    try:
        metric = kind(num_classes=num_classes, **options)
    except Exception as error:  # foreign code may fail in any way
        raise ConfigError(f"{place}: {called} cannot be made: {first_line(error)}") from error
    if not isinstance(metric, Metric):
        raise ConfigError(f"{place}: {called} makes no metric of torchmetrics' kind")
    for part in metric.modules():
        if isinstance(part, Metric):
            # Each rank has all rows already.
            part.distributed_available_fn = _alone
    _try(place, called, metric, num_classes)
    return metric


def _alone() -> bool:
    return False


def _try(place: str, called: str, metric: Metric, num_classes: int) -> None:
    """See on a row of each class whether a metric gives one number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            metric.update(torch.eye(num_classes), torch.arange(num_classes))
            value: Any = metric.compute()
            metric.reset()
        except Exception as error:  # foreign code may fail in any way
            raise ConfigError(f"{place}: {called} fails: {first_line(error)}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"{list(value.shape)} numbers" if isinstance(value, Tensor) else "no tensor"
        raise ConfigError(
            f"{place}: {called} gives {what}, and a metric is one number: leave it out, or set its "
            "options, such as average=macro"
        )
