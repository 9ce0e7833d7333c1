"""How weights are changed, and which of them are kept: optimizer, schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from equiloss.config.checks import finite, open_dict, positive, require
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
class OptimizerConfig:
    """An optimizer of torch.optim by name."""

    name: str = "SGD"
    """Class name in torch.optim."""
    lr: float = 0.1
    """Peak learning rate; schedulers scale it."""
    weight_decay: float = 0.0
    """Decay of weights; norms and biases (parameters with fewer than two axes) are exempt."""
    gradient_clip_norm: float | None = None
    """Clip the 2-norm of the synchronised gradient to this (null: off)."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Further keyword arguments of the optimizer, such as momentum."""

    def __post_init__(self) -> None:
        positive("optimizer.lr", self.lr)
        finite("optimizer.lr", self.lr)
        finite("optimizer.weight_decay", self.weight_decay, least=0)
        positive("optimizer.gradient_clip_norm", self.gradient_clip_norm)


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


@dataclass
class CallbacksConfig:
    """Callbacks of Lightning's, by names of one's own."""

    items: dict[str, Any] = field(default_factory=open_dict)
    """NAME: {target: package.module:Class, and keyword arguments}."""
