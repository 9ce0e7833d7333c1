"""How weights are changed, and which of them are kept: optimizer, schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from equiloss.config.checks import finite, is_patterns, open_dict, positive, require
from equiloss.config.metrics import evaluation_metrics, mode_of
from equiloss.errors import choose


def check_monitor(
    group: str, monitor: str, mode: str | None, extra: Mapping[str, Any], *, averaged: bool
) -> None:
    """Refuse a metric of no validation, and a mode that would keep the worst."""
    known = evaluation_metrics(extra, averaged=averaged)
    choose(f"{group}.monitor", monitor, [name for name in known if name.startswith("val/")])
    if mode is not None:
        choose(f"{group}.mode", mode, ("min", "max"))
        right = mode_of(monitor, extra)
        require(
            mode == right,
            f"{group}.mode={mode} would keep the worst {monitor}: it is {right}, also where it is "
            "left out",
        )


@dataclass
class GroupConfig:
    """Parameters that learn at a rate of their own: an entry of `optimizer.groups`."""

    pattern: Any
    """Patterns of parameters or modules of the network: a list of them, or one."""
    lr_factor: float = 1.0
    """Multiplies optimizer.lr."""
    weight_decay: float | None = None
    """Decay of all these parameters (null: the optimizer's, with norms and biases exempt)."""

    def __post_init__(self) -> None:
        require(
            bool(self.patterns) and is_patterns(self.patterns),
            "optimizer.groups: pattern is a name such as layer1 or *.bias, or a list of them; got "
            f"{self.pattern}",
        )
        for key, value in (("lr_factor", self.lr_factor), ("weight_decay", self.weight_decay)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            absent = value is None and key == "weight_decay"
            require(number or absent, f"optimizer.groups: {key} must be a number, got {value}")
            finite(f"optimizer.groups: {key}", value, least=0)

    @property
    def patterns(self) -> list[str]:
        """`pattern` as a list of names."""
        given = self.pattern if isinstance(self.pattern, list) else [self.pattern]
        return [str(each) if type(each) is int else each for each in given]  # a layer called 0


def groups_from(entries: Any) -> list[GroupConfig]:
    """The value of `optimizer.groups`, checked.

    Raises:
        ConfigError: for what is no list of groups, and for a key that a group has not.

    >>> groups_from([{"pattern": "head", "lr_factor": 10}])
    [GroupConfig(pattern='head', lr_factor=10, weight_decay=None)]
    """
    if entries is None:
        return []
    keys, groups = [each.name for each in fields(GroupConfig)], []
    form = "[{pattern: layer1, lr_factor: 0.1}]"
    require(isinstance(entries, list), f"optimizer.groups is a list, {form}; got {entries}")
    for number, entry in enumerate(entries):
        group = asdict(entry) if isinstance(entry, GroupConfig) else entry
        place = f"optimizer.groups[{number}]"
        require(
            isinstance(group, Mapping) and "pattern" in group,
            f"{place} is a pattern with what holds for it, as in {form}; got {group}",
        )
        for key in group:
            choose(f"key of {place}", str(key), keys)
        groups.append(GroupConfig(**group))
    return groups


@dataclass
class OptimizerConfig:
    """An optimizer of torch.optim by name."""

    name: str = "SGD"
    """Class name in torch.optim."""
    lr: float = 0.1
    """Peak learning rate; schedulers scale it."""
    weight_decay: float = 0.0
    """Decay of weights; norms and biases (parameters with fewer than two axes) are exempt."""
    groups: Any = None
    """Parameters with rates of their own, as [{pattern: layer?, lr_factor: 0.1, weight_decay: 0}]:
    the first pattern that matches wins, and what none matches has lr and weight_decay as above.
    A group's own decay is that of its norms and biases too (null: no groups)."""
    gradient_clip_norm: float | None = None
    """Clip the 2-norm of the synchronised gradient to this (null: off)."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Further keyword arguments of the optimizer, such as momentum."""

    def __post_init__(self) -> None:
        positive("optimizer.lr", self.lr)
        finite("optimizer.lr", self.lr)
        finite("optimizer.weight_decay", self.weight_decay, least=0)
        positive("optimizer.gradient_clip_norm", self.gradient_clip_norm)
        self.groups = groups_from(self.groups)


@dataclass
class SchedulerConfig:
    """A learning-rate schedule, stepped once per optimizer step."""

    name: str = "constant"
    """cosine | one_cycle | constant | a class name in torch.optim.lr_scheduler."""
    warmup_fraction: float = 0.0
    """Part of the run's steps that warm up linearly, before cosine or constant."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Further keyword arguments of the torch scheduler."""

    def __post_init__(self) -> None:
        require(
            0 <= self.warmup_fraction < 1,
            f"scheduler.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}",
        )


@dataclass
class EmaConfig:
    """An exponential moving average of the network's weights, beside the weights themselves."""

    decay: float | None = None
    """What stays of the average at each step, in [0, 1), such as 0.999; the rest is the step's
    weights (null: nothing is averaged)."""
    warmup: bool = True
    """Let the decay of step t = 0, 1, … be min(decay, (1 + t)/(10 + t)): the weights that a run
    starts with are soon forgotten."""

    def __post_init__(self) -> None:
        require(
            self.decay is None or 0 <= self.decay < 1,
            f"ema.decay must lie in [0, 1), got {self.decay}: 0.999 is usual, and null averages "
            "nothing",
        )


@dataclass
class CheckpointConfig:
    """What is kept of the weights."""

    monitor: str = "val/nll"
    """Metric that chooses best.ckpt; of a `val/ema_…` it holds the averaged weights."""
    mode: str | None = None
    """min | max: whether a smaller or a larger `monitor` is better (null: as the metric is)."""
    every_n_steps: int | None = None
    """Write last.ckpt every so many steps, besides each epoch's end (null: epochs only)."""

    def __post_init__(self) -> None:
        positive("checkpoint.every_n_steps", self.every_n_steps)


@dataclass
class EarlyStoppingConfig:
    """Stop when validation no longer improves."""

    enabled: bool = False
    """Whether validations may end the run."""
    monitor: str = "val/nll"
    """Metric to watch."""
    mode: str | None = None
    """min | max (null: as the metric is)."""
    patience: int = 5
    """Validations without improvement before the run ends."""
    min_delta: float = 0.0
    """Smallest change that counts, in the metric's unit."""

    def __post_init__(self) -> None:
        positive("early_stopping.patience", self.patience)
        finite("early_stopping.min_delta", self.min_delta)


# Lightning's callbacks that would break "the same number", or that have a key here.
REFUSED_CALLBACKS = {
    "GradientAccumulationScheduler": "set trainer.micro_batch_size, which keeps the loss of the "
    "whole global batch",
    "BatchSizeFinder": "data.batch_size is global, and trainer.micro_batch_size what fits",
    "StochasticWeightAveraging": "it changes the schedule that was asked for",
    "WeightAveraging": "set ema.decay, which keeps the weights and their average apart",
    "LearningRateFinder": "it would train before the run: sweep optimizer.lr",
    "ModelCheckpoint": "set checkpoint.monitor and checkpoint.every_n_steps",
    "EarlyStopping": "set callbacks=early_stopping",
}


@dataclass
class CallbacksConfig:
    """Callbacks of Lightning's, by names of one's own."""

    items: dict[str, Any] = field(default_factory=open_dict)
    """NAME: {target: package.module:Class, and keyword arguments}."""

    def __post_init__(self) -> None:
        # By name, before options are looked at; what is made is refused by what it is.
        for name, item in self.items.items():
            target = item.get("target") if isinstance(item, dict) else None
            module, _, kind = str(target).rpartition(":")
            refused = module.startswith("lightning.") and kind in REFUSED_CALLBACKS
            require(
                not refused,
                f"callbacks.items.{name}: {kind} is refused: {REFUSED_CALLBACKS.get(kind)}",
            )
