"""Lightning's Trainer as a run needs it, and what there is to say of it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichModelSummary
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from equiloss import external, live, ranks
from equiloss.checkpoint import AtomicCheckpointIO, Checkpoints
from equiloss.config import Config
from equiloss.data.datasets import Splits
from equiloss.errors import ConfigError, unknown
from equiloss.parity import ParityMonitor
from equiloss.tensorboard import EvaluationFigures

log = logging.getLogger(__name__)


def quieten_lightning() -> None:
    """Leave out what Lightning says on each run and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # torch renamed a class that Lightning still uses.
        ".*isinstance.treespec, LeafSpec.*",
        # In-memory sets are indexed in this process on purpose: workers would only copy.
        ".*does not have many workers.*",
        # The metrics are the same on every rank already: EvaluationMetric has added them up.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message)


def check_arguments(arguments: Iterable[str]) -> None:
    """Refuse arguments that Lightning's Trainer does not have.

    Args:
        arguments: Names, as in `+trainer.<argument>`.

    Raises:
        ConfigError: naming the first of them, and what is like it.
    """
    known = inspect.signature(Trainer).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(unknown("argument of Lightning's Trainer", name, known))


def make_trainer(
    config: Config,
    run_dir: Path,
    splits: Splits,
    monitor: ParityMonitor | None,
    checkpoints: Checkpoints,
    loggers: Sequence[Logger],
    more_callbacks: Sequence[Callback],
    *,
    batch_statistics: bool,
) -> Trainer:
    """Make the Trainer of a run.

    Args:
        config: The run's configuration.
        run_dir: Where everything goes.
        splits: The data, for figures.
        monitor: Checks parity, if anything does.
        checkpoints: Saves the run, if it is a fit.
        loggers: Get every scalar.
        more_callbacks: Come first.
        batch_statistics: Whether the network normalises over its batch.
    """
    callbacks = list(more_callbacks)
    if config.logger.tensorboard:
        callbacks.append(EvaluationFigures(splits))
    if monitor is not None:
        callbacks.append(monitor)
    if config.task == "fit":
        callbacks.append(checkpoints)
    if config.early_stopping.enabled:
        stop = config.early_stopping
        callbacks.append(
            EarlyStopping(
                stop.monitor, mode=stop.mode, patience=stop.patience, min_delta=stop.min_delta
            )
        )
    bar = config.progress_bar and live.is_live()
    if config.progress_bar:
        callbacks.append(live.LiveProgress() if bar else live.EpochLines())
    if config.model_summary:
        callbacks.append(RichModelSummary())

    plugins: list[Any] = [AtomicCheckpointIO()]
    group = external.found()
    if ranks.is_child() or group is not None:
        # Lightning would otherwise guess the cluster from variables around us, such as SLURM's.
        plugins.append(LightningEnvironment())

    options = config.trainer
    several = (ranks.world_size(options) if group is None else group.world_size) > 1
    on_gpu = options.accelerator not in ("cpu", "auto") or torch.cuda.is_available()
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices if group is None else group.local_world_size,
        num_nodes=1 if group is None else group.nodes,
        # Views of the buckets spare a copy of every gradient.
        strategy=DDPStrategy(gradient_as_bucket_view=True) if several else "auto",
        precision=options.precision,  # type: ignore[arg-type]  # checked by TrainerConfig
        max_epochs=-1 if options.max_epochs is None else options.max_epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        deterministic=options.deterministic,
        # SyncBatchNorm exists for GPUs only; on CPU ranks a warning says what follows.
        sync_batchnorm=several and on_gpu and batch_statistics,
        log_every_n_steps=options.log_every_n_steps,
        logger=list(loggers),
        callbacks=callbacks,
        plugins=plugins,
        enable_progress_bar=bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
        **options.arguments,
    )


def warn_of_batch_statistics(config: Config, trainer: Trainer) -> None:
    """Say where results of a network with batch normalisation depend on how the work is split."""
    if trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        log.warning(
            "model %r normalises over the batch: each rank uses the statistics of its own slice "
            "(SyncBatchNorm exists for GPUs only), so results depend on trainer.devices",
            config.model.name,
        )
    if config.trainer.micro_batch_size is not None:
        log.warning(
            "model %r normalises over the batch: trainer.micro_batch_size changes its statistics, "
            "and with them the result",
            config.model.name,
        )


def warn_of_draws(config: Config, trainer: Trainer, layers: Sequence[str]) -> None:
    """Say where results depend on how the work is split because layers draw by batch."""
    if layers and (trainer.world_size > 1 or config.trainer.micro_batch_size is not None):
        log.warning(
            "model %r draws random numbers by batch (%s): results depend on trainer.devices and "
            "trainer.micro_batch_size (torch.nn.Dropout draws by sample here, and does not)",
            config.model.name,
            ", ".join(layers),
        )
