"""Further metrics of every evaluation, by torchmetrics' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from equiloss.config.checks import open_dict, require
from equiloss.errors import choose
from equiloss.imports import import_torchmetrics

SPLIT_METRICS = ("loss", "nll", "acc", "balanced_acc", "acc_top5", "ece")
# Of the averaged weights (`ema.decay`), in validations.
AVERAGED_METRICS = ("ema_loss", "ema_nll", "ema_acc")


@dataclass
class MetricsConfig:
    """What is measured of each evaluation, besides what always is."""

    extra: dict[str, Any] = field(default_factory=open_dict)
    """NAME: a class of torchmetrics.classification without `Multiclass`, such as F1Score, or
    {name: F1Score, and keyword arguments}, or {target: package.module:Class, mode: min | max}."""

    def __post_init__(self) -> None:
        for name, entry in self.extra.items():
            key = f"metrics.extra.{name}"
            require(str(name).isidentifier(), f"{key}: a metric's name is letters, digits and _")
            require(name not in SPLIT_METRICS, f"{key}: every run has a metric of that name")
            named = isinstance(entry, Mapping) and ("name" in entry) != ("target" in entry)
            require(
                named or isinstance(entry, str),
                f"{key} needs a name of torchmetrics', such as {key}=F1Score or "
                f"{key}={{name:F1Score,average:micro}}, or a target=package.module:Class",
            )
            if isinstance(entry, Mapping) and entry.get("mode") is not None:
                choose(f"{key}.mode", str(entry["mode"]), ("min", "max"))


def split_metrics(extra: Iterable[str]) -> list[str]:
    """Names of all metrics of a split, of which some are extra.

    >>> split_metrics({"f1": "F1Score"})[-2:]
    ['ece', 'f1']
    """
    return [*SPLIT_METRICS, *extra]


def evaluation_metrics(extra: Iterable[str], *, averaged: bool) -> list[str]:
    """Names of all metrics of a run's evaluations, with their split's.

    Args:
        extra: Names of further metrics.
        averaged: Whether averaged weights are validated beside the raw ones.

    >>> [name for name in evaluation_metrics([], averaged=True) if "nll" in name]
    ['val/nll', 'val/ema_nll', 'test/nll']
    """
    own = split_metrics(extra)
    validated = [*own, *AVERAGED_METRICS] if averaged else own
    return [*(f"val/{name}" for name in validated), *(f"test/{name}" for name in own)]


def mode_of(metric: str, extra: Any = None) -> str:
    """Whether a smaller or a larger value of a metric is better: min | max.

    Args:
        metric: Its name, with the split's: `val/acc`.
        extra: `metrics.extra`, after `with_modes`, or anything that a file has in its place.

    >>> mode_of("val/acc_top5"), mode_of("val/ema_acc"), mode_of("test/nll")
    ('max', 'max', 'min')
    >>> mode_of("val/f1", {"f1": {"name": "F1Score", "mode": "max"}})
    'max'
    """
    name = metric.partition("/")[2]
    entry = extra.get(name) if isinstance(extra, Mapping) else None
    if isinstance(entry, Mapping):
        return "max" if entry.get("mode") == "max" else "min"
    return "max" if name in ("acc", "balanced_acc", "acc_top5", "ema_acc") else "min"


def with_modes(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics.extra` with each entry written out, its mode included where torchmetrics knows it.

    Raises:
        ConfigError: for a name that torchmetrics has not.

    >>> with_modes({"f1": "F1Score"})
    {'f1': {'name': 'F1Score', 'mode': 'max'}}
    """
    complete = {}
    for key, entry in extra.items():
        entry = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" in entry and entry.get("mode") is None:
            kind = torchmetrics_class(f"metrics.extra.{key}", str(entry["name"]))
            better = kind.higher_is_better
            entry["mode"] = None if better is None else ("min", "max")[better]
        complete[key] = entry
    return complete


def torchmetrics_class(key: str, name: str) -> Any:
    """A class of `torchmetrics.classification` by its name without `Multiclass`.

    Raises:
        ConfigError: naming the near miss.
    """
    import_torchmetrics()  # which takes seconds, and few runs need it
    from torchmetrics import classification

    prefix = "Multiclass"
    known = [each.removeprefix(prefix) for each in classification.__all__ if prefix in each]
    return getattr(classification, prefix + choose(key, name.removeprefix(prefix), known))
