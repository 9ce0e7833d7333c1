"""Lightning's Trainer as a run needs it, and what there is to say of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichModelSummary
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from equiloss.config import Config
from equiloss.data.datasets import Splits
from equiloss.distributed import membership
from equiloss.parity.monitor import ParityMonitor
from equiloss.training import progress_bar
from equiloss.training.checkpoint import AtomicCheckpointIO, Checkpoints
from equiloss.training.evaluation_figures import EvaluationFigures

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
    bar = config.progress_bar and progress_bar.is_live()
    if config.progress_bar:
        callbacks.append(progress_bar.LiveProgress() if bar else progress_bar.EpochLines())
    if config.model_summary:
        callbacks.append(RichModelSummary())

    plugins: list[Any] = [AtomicCheckpointIO()]
    group = membership.found()
    if membership.is_child() or group is not None:
        # Lightning would otherwise guess the cluster from variables around us, such as SLURM's.
        plugins.append(LightningEnvironment())

    options = config.trainer
    several = (membership.world_size(options) if group is None else group.world_size) > 1
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
