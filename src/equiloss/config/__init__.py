"""The typed configuration: one dataclass for each Hydra group, each field with meaning and unit.

The classes are the schema that `conf/config.yaml` starts from, so a value of the wrong type is
refused while Hydra composes; `__post_init__` refuses values that have the right type and make
no sense. Defaults live here, and the files in `conf/` hold only what distinguishes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from equiloss.config.checks import open_dict, require
from equiloss.config.data import AugmentConfig, DataConfig
from equiloss.config.loggers import LoggerConfig, MlflowConfig, WandbConfig
from equiloss.config.metrics import (
    AVERAGED_METRICS,
    SPLIT_METRICS,
    MetricsConfig,
    evaluation_metrics,
    mode_of,
)
from equiloss.config.network import ModelConfig
from equiloss.config.parity import ParityConfig
from equiloss.config.sweep import SweepConfig
from equiloss.config.trainer import PRECISIONS, REFUSED_TRAINER_ARGUMENTS, TrainerConfig
from equiloss.config.training import (
    REFUSED_CALLBACKS,
    CallbacksConfig,
    CheckpointConfig,
    EarlyStoppingConfig,
    EmaConfig,
    OptimizerConfig,
    SchedulerConfig,
    check_monitor,
)
from equiloss.errors import choose

__all__ = [
    "PRECISIONS",
    "REFUSED_CALLBACKS",
    "REFUSED_TRAINER_ARGUMENTS",
    "SPLIT_METRICS",
    "AugmentConfig",
    "CallbacksConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "EmaConfig",
    "LoggerConfig",
    "MetricsConfig",
    "MlflowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParityConfig",
    "SchedulerConfig",
    "SweepConfig",
    "TrainerConfig",
    "WandbConfig",
    "open_dict",
]


@dataclass
class Config:
    """A whole run."""

    loss: Any = MISSING
    """Name and options of a registered loss; its keys come from the loss's own signature."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    task: str = "fit"
    """fit | validate | test."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    ckpt_path: str | None = None
    """Checkpoint to evaluate (task=validate or test)."""
    run: str | None = None
    """Directory of a run to evaluate by its own configuration (task=validate or test); keys and
    groups on the command line change it, and ckpt_path is its tested weights unless set."""
    resume: str = "auto"
    """auto | never: continue the interrupted run that a directory holds, or refuse to touch it."""
    in_use: str = "refuse"
    """refuse | wait: what to do about a directory that another process is working on. unlocked:
    refuse it, and use a file system that has no locks without them."""
    test_weights: str = "best"
    """best | last | ema: the weights that are tested after a fit; ema are the averaged ones."""
    objective: str = "val/nll"
    """Metric that `train.py` returns to a sweeper."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    init_from: str | None = None
    """Checkpoint whose weights a fit starts from; its schedule begins anew."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by, which change nothing in it."""
    profile: bool = False
    """Print where the time of a fit goes, by stage, and write trace.json, which Perfetto opens."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    progress_bar: bool = True
    """Show progress while the run goes on; train/loss there is that of the last batch."""
    model_summary: bool = True
    """Print the network's layers and parameter counts."""

    def __post_init__(self) -> None:
        choose("task", self.task, ("fit", "validate", "test"))
        choose("resume", self.resume, ("auto", "never"))
        choose("in_use", self.in_use, ("refuse", "wait", "unlocked"))
        choose("test_weights", self.test_weights, ("best", "last", "ema"))
        require(
            self.test_weights != "ema" or self.ema.decay is not None,
            "test_weights=ema tests averaged weights, and nothing averages them: set ema.decay, "
            "such as ema.decay=0.999, or test_weights to best or last",
        )
        self._check_metrics()
        require(
            not (self.profile and "profiler" in self.trainer.arguments),
            "profile=true has a profiler of its own: leave out +trainer.profiler",
        )
        require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), got {self.seed}")
        require(
            self.init_from is None or self.task == "fit",
            f"init_from is where task=fit starts from, and task={self.task} has ckpt_path or run",
        )
        require(
            self.init_from is None or self.model.weights is None,
            f"init_from={self.init_from} and model.weights={self.model.weights} both say what a "
            "fit starts from: give one",
        )
        require(
            (self.ckpt_path is None) == (self.task == "fit"),
            "ckpt_path names the checkpoint for task=validate and task=test, and only there (or "
            f"run= the directory of its run): task={self.task} "
            f"ckpt_path={self.ckpt_path or 'null'}",
        )

    def _check_metrics(self) -> None:
        """Refuse what watches a metric that is none, or whose better end is not known."""
        extra = self.metrics.extra
        averaged = self.ema.decay is not None
        self._check_averaged(averaged)
        choose("objective", self.objective, evaluation_metrics(extra, averaged=averaged))
        for watched in (self.objective, self.checkpoint.monitor, self.early_stopping.monitor):
            entry = extra.get(watched.partition("/")[2], {"mode": "known"})
            require(
                isinstance(entry, Mapping) and bool(entry.get("mode")),
                f"{watched} is watched, and which end of it is better is not known: set "
                f"metrics.extra.{watched.partition('/')[2]}.mode=min or max",
            )
        watches: dict[str, CheckpointConfig | EarlyStoppingConfig] = {
            "checkpoint": self.checkpoint,
            "early_stopping": self.early_stopping,
        }
        for group, watch in watches.items():
            check_monitor(group, watch.monitor, watch.mode, extra, averaged=averaged)
            watch.mode = mode_of(watch.monitor, extra)

    def _check_averaged(self, averaged: bool) -> None:
        """Refuse what watches averaged weights where there are none, and names that they need."""
        taken = [name for name in AVERAGED_METRICS if name in self.metrics.extra]
        require(
            not (averaged and taken),
            f"metrics.extra.{''.join(taken[:1])}: with ema.decay a metric has that name",
        )
        watches = {
            "objective": self.objective,
            "checkpoint.monitor": self.checkpoint.monitor,
            "early_stopping.monitor": self.early_stopping.monitor,
        }
        for key, watched in watches.items():
            name = watched.removeprefix("val/")
            require(
                averaged or name not in AVERAGED_METRICS or name in taken,
                f"{key}={watched} is of averaged weights, and nothing averages them: set "
                "ema.decay, such as ema.decay=0.999",
            )
