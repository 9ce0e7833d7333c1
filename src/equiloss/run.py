"""One run: configuration -> objects -> fit -> test -> Result."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from equiloss import randomness
from equiloss.config import Config
from equiloss.config.resolved import ResolvedConfig
from equiloss.data import datasets
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import Splits
from equiloss.distributed import collectives
from equiloss.errors import ConfigError
from equiloss.losses.criterion import Criterion
from equiloss.models import build
from equiloss.models.dropout import RowKeys
from equiloss.parity.monitor import ParityMonitor
from equiloss.preflight import network
from equiloss.preflight.arguments import check_arguments
from equiloss.preflight.network import draws_by_batch, warn_of_batch_statistics, warn_of_draws
from equiloss.records import results
from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.results import Result, metric_names
from equiloss.records.tensorboard import RunTensorBoard
from equiloss.records.trackers import tracked
from equiloss.training import checkpoint, optim
from equiloss.training.checkpoint import AtomicCheckpointIO, Checkpoints
from equiloss.training.classifier import Classifier
from equiloss.training.trainer import make_trainer, quieten_lightning

log = logging.getLogger(__name__)

WEIGHTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def run(resolved: ResolvedConfig, run_dir: Path, *, callbacks: Sequence[Callback] = ()) -> Result:
    """Do the configured task in this process, which may be one rank of several.

    A fit continues from `run_dir/checkpoints/last.ckpt` where that exists.

    Args:
        resolved: The configuration; the same on every rank.
        run_dir: Where everything goes; the first rank writes.
        callbacks: Further callbacks for Lightning's Trainer.

    Returns:
        The result, which is also written to `run_dir/results.json`.

    Raises:
        UserError: for everything that a user can mend.
    """
    started = time.perf_counter()
    run_dir.mkdir(parents=True, exist_ok=True)
    quieten_lightning()
    config = resolved.config
    check_arguments(config.trainer.arguments)
    randomness.seed_everything(config.seed)
    splits = datasets.load(config.data)
    criterion = Criterion(**config.loss, class_counts=splits.class_counts)
    criterion.check_classes(splits.num_classes)
    if config.data.augment.mixes and not criterion.signature.soft_targets:
        raise ConfigError(
            f"data.augment.mixup and cutmix turn classes into probabilities, and loss "
            f"{criterion.name!r} takes classes: use one with soft targets, such as cross_entropy"
        )
    rows = RowKeys(config.seed)
    model = build.build(
        config.model,
        num_classes=splits.num_classes,
        image_shape=splits.image_shape,
        rows=rows,
    )
    network.check_head(config.model.name, model, splits.num_classes, splits.image_shape)
    model = build.lay_out(config.model, model)
    if criterion.signature.wants_features:
        build.expose_head(
            config.model.name, model, splits.num_classes, compiled=config.model.compile
        )
    # Lightning would convert after it has loaded a checkpoint, and round float64 on the way.
    dtype = WEIGHTS.get(config.trainer.precision, torch.float32)
    classifier = Classifier(
        model.to(dtype),
        criterion.to(dtype),
        config,
        rows=rows,
        num_classes=splits.num_classes,
        split_sizes={"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
    )
    shards = config.trainer.shards if config.trainer.reduction == "bitwise" else None
    data = ImageDataModule(
        splits,
        config.data,
        seed=config.seed,
        ignore_index=criterion.ignore_index,
        channels_last=config.model.channels_last,
        shards=shards,
    )
    monitor = _parity_monitor(config, criterion, splits)
    metrics_csv = MetricsCsv(run_dir, metric_names(config.parity.formulations))
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, metrics_csv)
    continued = _continued(config, checkpoints)
    loggers: list[MetricsCsv | RunTensorBoard] = [
        metrics_csv,
        *_boards(resolved, run_dir, continued),
    ]
    batch_statistics = network.has_batch_statistics(model)
    if batch_statistics and config.trainer.reduction == "bitwise":
        raise ConfigError(
            f"trainer.reduction=bitwise: model {config.model.name!r} normalises over the batch, "
            "and a shard would have statistics of its own; use group or layer normalisation"
        )
    try:
        trainer = make_trainer(
            config,
            run_dir,
            splits,
            monitor,
            checkpoints,
            loggers,
            callbacks,
            batch_statistics=batch_statistics,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            f"trainer.accelerator={config.trainer.accelerator} "
            f"trainer.devices={config.trainer.devices}: {error}"
        ) from error
    if batch_statistics:
        warn_of_batch_statistics(config, trainer)
    warn_of_draws(config, trainer, draws_by_batch(model))
    try:
        with tracked(trainer, resolved, run_dir, continued=continued is not None) as final:
            metrics = _do(config, trainer, classifier, data, checkpoints, continued)
            final.update(metrics)
    finally:
        for logger in loggers:
            logger.close()
    result = Result(
        status="completed",
        config_hash=resolved.hash,
        loss={"name": criterion.name, "options": criterion.options},
        metrics={n: metrics[n] for n in metric_names(config.parity.formulations) if n in metrics},
        parity=monitor.summary() if monitor else {},
        samples={
            "train_seen": classifier.train_seen,
            **classifier.samples,
        },
        steps={
            "taken": classifier.global_step,
            "skipped": classifier.skipped_steps,
            "zero_mass": classifier.zero_mass_steps,
        },
        world_size=collectives.world_size(),
        segments=classifier.segments,
        timing={
            "startup_s": max(classifier.training_began - started, 0.0),
            "train_s": classifier.train_seconds,
            "samples_per_s": classifier.train_seen / classifier.train_seconds
            if classifier.train_seconds
            else 0.0,
        },
        environment=results.environment(trainer.strategy.root_device, shards),
    )
    if trainer.is_global_zero:
        evaluated = {
            split: found.as_dict(matrix=splits.num_classes <= 100)
            for split, found in classifier.evaluated.items()
        }
        results.write_evaluations(run_dir, evaluated, splits.class_names)
        result.write(run_dir)
    return result


def _do(
    config: Config,
    trainer: Trainer,
    classifier: Classifier,
    data: ImageDataModule,
    checkpoints: Checkpoints,
    continued: int | None,
) -> dict[str, float]:
    """Fit and test, or evaluate a checkpoint; returns the final value of every metric."""
    if config.task != "fit":
        checkpoint.load_weights(classifier, Path(str(config.ckpt_path)))
        evaluate = trainer.validate if config.task == "validate" else trainer.test
        evaluate(classifier, datamodule=data, verbose=False)
        return dict(classifier.scalars)
    if continued is not None and trainer.is_global_zero:
        log.info("continuing %s after %d steps", checkpoints.last_path, continued)
    trainer.fit(
        classifier,
        datamodule=data,
        ckpt_path=None if continued is None else checkpoints.last_path,
    )
    if classifier.validated_step != classifier.global_step:
        # max_steps ended the run inside an epoch: its last weights are validated too.
        trainer.validate(classifier, datamodule=data, verbose=False)
    metrics = dict(classifier.scalars)
    if config.test_weights == "best":
        metrics |= checkpoint.load_weights(classifier, checkpoints.best_path)
    trainer.test(classifier, datamodule=data, verbose=False)
    return metrics | classifier.split_scalars("test")


def _parity_monitor(config: Config, criterion: Criterion, splits: Splits) -> ParityMonitor | None:
    if config.task != "fit" or config.parity.every_n_steps == 0:
        return None
    steps = optim.total_steps(
        config.trainer, train_samples=len(splits.train), batch_size=config.data.batch_size
    )
    return ParityMonitor(
        config.parity,
        criterion,
        total_steps=steps,
        seed=config.seed,
        class_counts=splits.class_counts,
    )


def _continued(config: Config, checkpoints: Checkpoints) -> int | None:
    """Optimizer steps that an interrupted fit had taken when it was last saved, if it was."""
    if config.task != "fit" or not checkpoints.last_path.is_file():
        return None
    steps: int = AtomicCheckpointIO().load_checkpoint(checkpoints.last_path)["global_step"]
    return steps


def _boards(resolved: ResolvedConfig, run_dir: Path, continued: int | None) -> list[RunTensorBoard]:
    if not resolved.config.logger.tensorboard:
        return []
    formulations = resolved.config.parity.formulations
    board = RunTensorBoard(
        run_dir,
        config=resolved.plain,
        config_text=resolved.text,
        metrics=metric_names(formulations),
        formulations=formulations,
        first_step=continued,
    )
    board.describe_run()
    return [board]
