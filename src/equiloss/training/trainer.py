"""Lightning's Trainer as a run needs it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from equiloss.config import Config
from equiloss.config.metrics import mode_of
from equiloss.distributed import membership
from equiloss.models import batch_norm
from equiloss.training import progress_bar
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from equiloss.training.classifier import Classifier
from equiloss.training.fine_tuning import FineTuning
from equiloss.training.profile import Profile, Stages
from equiloss.training.time_limit import TimeLimit

# The longest time that 32 bits of milliseconds hold.
WITHOUT_END = timedelta(days=24)


def quieten_lightning() -> None:
    """Leave out what Lightning says on each run and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # torch renamed a class that Lightning still uses.
        ".*isinstance.treespec, LeafSpec.*",
        # In-memory sets are indexed in this process on purpose: workers would only copy.
        ".*does not have many workers.*",
        # How many there are is the configuration's to say.
        ".*worker processes in total. Our suggested max.*",
        # The metrics are the same on every rank already: EvaluationMetric has added them up.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message)


def make_trainer(
    config: Config,
    run_dir: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    *,
    model: nn.Module,
) -> Trainer:
    """Build Lightning's Trainer.

    Args:
        config: The run's configuration.
        run_dir: Where everything goes.
        callbacks: The run's own; what the configuration asks for comes after them.
        loggers: Get every scalar.
        model: The network; its batch normalisation is made to go over all ranks.
    """
    options, group = config.trainer, membership.external()
    world_size = membership.ranks_asked_for(options) if group is None else group.world_size
    on_gpu = options.accelerator not in ("cpu", "auto") or torch.cuda.is_available()
    torchs = batch_norm.is_torchs(model)
    stages = Stages() if config.profile else None
    watching = [Profile(stages, run_dir, Console().print)] if stages else []
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices if group is None else group.local_world_size,
        num_nodes=1 if group is None else world_size // group.local_world_size,
        strategy=strategy(world_size),
        precision=options.precision,  # type: ignore[arg-type]  # checked by TrainerConfig
        max_epochs=-1 if options.max_epochs is None else options.max_epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        deterministic=options.deterministic,
        # torch's exists for GPUs only.
        sync_batchnorm=world_size > 1 and on_gpu and batch_norm.is_in(model) and torchs,
        log_every_n_steps=options.log_every_n_steps,
        logger=list(loggers),
        callbacks=[*watching, *callbacks, *_configured_callbacks(config, model)],
        # Lightning would otherwise guess a cluster from variables around us, such as SLURM's.
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
        **options.arguments | ({"profiler": stages} if stages else {}),
    )
    _leave_signals_alone(trainer)
    if trainer.strategy.root_device.type == "cpu" or not torchs:
        batch_norm.synchronise(model)
    return trainer


def _leave_signals_alone(trainer: Trainer) -> None:
    """Take out Lightning's own handling of signals: ours agrees on a step (see `interruption`).

    It would broadcast inside a handler, which a rank that got no signal never answers, and in each
    step, where it would also wait for the device.
    """
    signals, epochs = trainer._signal_connector, trainer.fit_loop.epoch_loop
    signals.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    epochs._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class _DataParallel(DDPStrategy):
    """Lightning's, with what travels with the gradients."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        assert isinstance(model, Classifier)
        with model.gradient_sums.joining(model, model.loss_dtype):
            return super()._setup_model(model)


def strategy(world_size: int) -> Strategy | str:
    """How so many ranks train together; each has a replica of the network."""
    if world_size == 1:
        return "auto"
    # Views of the buckets spare a copy of every gradient. How long ranks wait for each other is
    # decided by who starts them: for a rank that lives, as long as it takes.
    return _DataParallel(gradient_as_bucket_view=True, timeout=WITHOUT_END)


def _configured_callbacks(config: Config, model: nn.Module) -> Iterator[Callback]:
    if config.trainer.max_seconds is not None:
        yield TimeLimit(config.trainer.max_seconds)
    if config.task == "fit" and (config.model.freeze is not None or config.optimizer.groups):
        yield FineTuning(config.optimizer, model)
    stop = config.early_stopping
    if stop.enabled:
        yield EarlyStopping(
            stop.monitor,
            mode=mode_of(stop.monitor, config.metrics.extra),
            patience=stop.patience,
            min_delta=stop.min_delta,
        )
    if config.progress_bar:
        yield progress_bar.fitting()
    if config.model_summary:
        yield progress_bar.NetworkSummary(max_depth=2)


def stopped_early(trainer: Trainer) -> dict[str, Any]:
    """When and why early stopping ended a fit, as results.json has it; {} if it did not."""
    stop = trainer.early_stopping_callback
    if not isinstance(stop, EarlyStopping) or stop.stopping_reason_message is None:
        return {}
    each_epoch = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0
    epoch = stop.stopped_epoch + 1
    return {
        "epoch": epoch,
        "of_epochs": trainer.max_epochs,
        "monitor": stop.monitor,
        "validations_without_improvement": stop.wait_count,
        "best": float(stop.best_score),
        "best_epoch": epoch - stop.wait_count if each_epoch else None,
    }
