"""`logger=…`: what a run writes beside metrics.csv."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from equiloss.config.checks import require
from equiloss.errors import choose


@dataclass
class WandbConfig:
    """Weights & Biases. The API key has no key here: `wandb login` or WANDB_API_KEY has it."""

    enabled: bool = False
    """Whether to log there."""
    project: str | None = None
    """Project (null: WANDB_PROJECT, otherwise equiloss)."""
    entity: str | None = None
    """User or team (null: WANDB_ENTITY, otherwise the default of the login)."""
    name: str | None = None
    """Name of the run (null: its loss and seed)."""
    group: str | None = None
    """Group of the run (null: the sweep's name, otherwise WANDB_RUN_GROUP)."""
    mode: str | None = None
    """online | offline, for `wandb sync` later (null: WANDB_MODE, otherwise online)."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            choose("logger.wandb.mode", self.mode, ("online", "offline"))


@dataclass
class MlflowConfig:
    """MLflow. Passwords have no key here: MLflow reads them from its own variables."""

    enabled: bool = False
    """Whether to log there."""
    experiment: str | None = None
    """Experiment (null: MLFLOW_EXPERIMENT_NAME, otherwise equiloss)."""
    name: str | None = None
    """Name of the run (null: its loss and seed)."""
    tracking_uri: str | None = None
    """Server or database (null: MLFLOW_TRACKING_URI, otherwise `mlflow.db` in the sweep's
    directory, or in that of a single run)."""

    def __post_init__(self) -> None:
        require(
            urlsplit(self.tracking_uri or "").password is None,
            "logger.mlflow.tracking_uri would be stored with its password: set "
            "MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD instead",
        )


@dataclass
class LoggerConfig:
    """Loggers beside metrics.csv, which every run writes."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
