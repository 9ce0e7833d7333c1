"""One run: configuration -> parts -> fit -> test -> Result."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from torch import nn

from equiloss import randomness
from equiloss.config import Config
from equiloss.config.resolved import ResolvedConfig
from equiloss.data import datasets
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import Splits
from equiloss.data.loader import naming_dead_workers
from equiloss.distributed import collectives, interruption, membership
from equiloss.distributed.interruption import Interrupted
from equiloss.losses.criterion import Criterion
from equiloss.models import build as networks
from equiloss.models.dropout import RowKeys
from equiloss.parity.monitor import ParityMonitor
from equiloss.preflight import configuration, network
from equiloss.preflight.behaviour import Found, by_row, look
from equiloss.records import results, run_dir
from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.results import Result, metric_names
from equiloss.records.tensorboard import RunTensorBoard
from equiloss.records.trackers import tracked
from equiloss.training import optim, own_callbacks, starting_weights
from equiloss.training.about import About
from equiloss.training.averaging import Averaging
from equiloss.training.checkpoint import Checkpoints
from equiloss.training.classifier import Classifier
from equiloss.training.evaluation_figures import EvaluationFigures
from equiloss.training.run_log import RunLog
from equiloss.training.trainer import make_trainer, quieten_lightning, stopped_early

log = logging.getLogger(__name__)


def run(resolved: ResolvedConfig, directory: Path, *, callbacks: Sequence[Callback] = ()) -> Result:
    """Do the configured task in this process, which may be one rank of several.

    A fit continues from `directory/checkpoints/last.ckpt` where that exists.

    Args:
        resolved: The configuration; the same on every rank.
        directory: The run directory; the first rank writes.
        callbacks: Further callbacks for Lightning's Trainer.

    Returns:
        The result, which is also written to `directory/results.json`: of a run that fails or is
        interrupted what it had found by then.

    Raises:
        UserError: for everything that a user can mend.
        Interrupted: if a signal asked for it, with the state on disk.
    """
    started = time.perf_counter()
    quieten_lightning()
    parts = build(resolved, directory, callbacks)
    with interruption.during_a_run():
        try:
            with _loggers(parts) as final:
                final |= fit_and_test(parts)
        except BaseException as error:
            with suppress(Exception):  # nothing may hide what ended the run
                _leave_unfinished(parts, error, started)
            raise
        return conclude(parts, final, started)


@dataclass
class Parts:
    """What a run is made of."""

    resolved: ResolvedConfig
    directory: Path
    splits: Splits
    classifier: Classifier
    data: ImageDataModule
    monitor: ParityMonitor | None
    checkpoints: Checkpoints
    metrics_csv: MetricsCsv
    board: RunTensorBoard | None
    trainer: Trainer
    found: list[Found]
    """What the network was seen to do before the first step."""
    continued: int | None
    """Optimizer steps that an interrupted fit had taken when it was last saved, if it was."""

    @property
    def config(self) -> Config:
        """The typed configuration."""
        return self.resolved.config


def build(resolved: ResolvedConfig, directory: Path, callbacks: Sequence[Callback] = ()) -> Parts:
    """Make everything that a run needs, and look at how it goes together; nothing is written."""
    config = resolved.config
    configuration.check_arguments(config.trainer.arguments)
    randomness.seed_everything(config.seed)
    splits = _splits(config)
    criterion = Criterion(**config.loss, class_counts=splits.class_counts)
    configuration.check_losses(config, criterion, splits.num_classes)
    data = ImageDataModule(
        splits,
        config.data,
        seed=config.seed,
        ignore_index=criterion.ignore_index,
        shards=config.trainer.shards if config.trainer.reduction == "bitwise" else None,
    )
    criterion.expect(ignored_rows=data.has_ignored_rows)
    row_keys = RowKeys(config.seed)
    model, found = _network(config, criterion, data, row_keys)
    total_steps = optim.total_steps(
        config.trainer, train_samples=len(splits.train), batch_size=config.data.batch_size
    )
    classifier = Classifier(
        model,
        criterion,
        config,
        row_keys=row_keys,
        num_classes=splits.num_classes,
        split_sizes={split: len(getattr(splits, split)) for split in ("train", "val", "test")},
        total_steps=total_steps,
        fingerprint=splits.fingerprint() if config.task == "fit" else None,
        about=About.of_run(config, splits),
    )
    monitor = ParityMonitor.of_run(
        config, criterion, splits.class_counts, total_steps, by_row=by_row(found)
    )
    averaging = Averaging.of_run(config, directory)
    names = metric_names(config.parity.formulations, config.metrics.extra, averaged=bool(averaging))
    metrics_csv = MetricsCsv(directory, names)
    checkpoints = Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint, metrics_csv)
    continued = checkpoints.find_state() if config.task == "fit" else None
    board = _board(resolved, directory, names, continued) if config.logger.tensorboard else None
    figures = EvaluationFigures(splits) if board else None
    own: list[Callback | None] = [figures, RunLog(directory, resolved), monitor]
    own += [averaging, checkpoints] if config.task == "fit" else []
    try:
        trainer = make_trainer(
            config,
            directory,
            [*callbacks, *filter(None, own), *own_callbacks.build(config.callbacks.items)],
            [metrics_csv, *([board] if board else [])],
            model=model,
        )
    except Exception as error:  # Lightning checks its arguments in many ways
        raise configuration.refusal(config.trainer, error) from error
    network.judge(config, found, trainer.world_size)
    starting_weights.give_weights(classifier, continued=continued is not None)
    return Parts(
        *(resolved, directory, splits, classifier, data, monitor),
        *(checkpoints, metrics_csv, board, trainer, found, continued),
    )


@naming_dead_workers()
@optim.without_search_for_gpus()
def fit_and_test(parts: Parts) -> dict[str, float]:
    """Fit and test, or evaluate a checkpoint; returns the final value of every metric."""
    config, trainer, classifier = parts.config, parts.trainer, parts.classifier
    progress, checkpoints, data = classifier.progress, parts.checkpoints, parts.data
    if config.task != "fit":
        evaluate = trainer.validate if config.task == "validate" else trainer.test
        evaluate(classifier, datamodule=data, verbose=False)
        return dict(progress.scalars)
    if parts.continued is not None and trainer.is_global_zero:
        log.info("continuing %s after %d steps", checkpoints.found, parts.continued)
    trainer.fit(classifier, datamodule=data, ckpt_path=checkpoints.found)
    progress = classifier.progress  # a checkpoint has its own
    if progress.counts.validated_step != classifier.global_step:
        # max_steps ended the run inside an epoch: its last weights are validated too.
        trainer.validate(classifier, datamodule=data, verbose=False)
    metrics = progress.scalars | checkpoints.load_tested(classifier)
    trainer.test(classifier, datamodule=data, verbose=False)
    return metrics | progress.of_split("test")


def conclude(parts: Parts, metrics: Mapping[str, float], started: float) -> Result:
    """Make the result of a completed run; the first rank writes it, and the evaluations."""
    result = _result(parts, metrics, started)
    if parts.trainer.is_global_zero:
        matrix = parts.splits.num_classes <= 100
        evaluated = parts.classifier.evaluated.items()
        evaluations = {split: metric.as_dict(matrix=matrix) for split, metric in evaluated}
        results.write_evaluations(parts.directory, evaluations, parts.splits.class_names)
        result.write(parts.directory)
    return result


def _result(parts: Parts, metrics: Mapping[str, float], started: float) -> Result:
    """Everything that a run has counted and measured, so far."""
    classifier = parts.classifier
    progress, counts = classifier.progress, classifier.progress.counts
    began, seconds = classifier.clock.began, counts.train_seconds
    return Result(
        status="completed",
        config_hash=parts.resolved.hash,
        loss=classifier.run_loss,
        metrics={name: metrics[name] for name in parts.metrics_csv.columns if name in metrics},
        parity=parts.monitor.summary() if parts.monitor else {},
        samples={"train_seen": counts.train_seen, **progress.samples},
        steps={
            "taken": classifier.global_step,
            "skipped": counts.skipped_steps,
            "zero_mass": counts.zero_mass_steps,
        },
        world_size=collectives.world_size(),
        segments=progress.segments,
        network=[each._asdict() for each in parts.found],
        stopped_early=stopped_early(parts.trainer),
        num_classes=parts.splits.num_classes,
        notes=progress.notes,
        timing={
            "startup_s": 0.0 if began is None else began - started,
            "train_s": seconds,
            "samples_per_s": counts.train_seen / seconds if seconds else 0.0,
        },
        environment=results.environment(parts.trainer.strategy.root_device, parts.data.shards),
    )


def _leave_unfinished(parts: Parts, error: BaseException, started: float) -> None:
    """Write what a run had found as it broke off, unless another rank has said why."""
    if parts.trainer.is_global_zero and not (parts.directory / run_dir.RESULTS).exists():
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        result = _result(parts, {}, started)
        replace(result, status=status, error=str(error)).write(parts.directory)


@contextmanager
def _loggers(parts: Parts) -> Iterator[dict[str, float]]:
    """Open every logger while the context lasts; yields a dictionary for the final metrics."""
    with ExitStack() as stack:
        continued = parts.continued is not None
        parts.directory.mkdir(parents=True, exist_ok=True)
        # Trackers come first: where one cannot be had, nothing was changed.
        final = stack.enter_context(
            tracked(parts.trainer, parts.resolved, parts.directory, continued=continued)
        )
        if parts.trainer.is_global_zero:
            parts.checkpoints.set_damaged_aside()
            run_dir.clear(parts.directory, continued=continued)
        stack.callback(parts.metrics_csv.close)
        if parts.board is not None:
            stack.enter_context(parts.board.opened())
        yield final


def _splits(config: Config) -> Splits:
    """The data, after what a user should know of how they were read."""
    splits = datasets.load(config.data, ignore_index=config.loss.get("ignore_index"))
    for note in splits.notes:
        log.warning("data=%s: %s", config.data.name, note)
    return splits


def _network(
    config: Config, criterion: Criterion, data: ImageDataModule, row_keys: RowKeys
) -> tuple[nn.Module, list[Found]]:
    """The network, and what it was seen to do."""
    num_classes, image_shape = data.splits.num_classes, data.splits.image_shape
    model = networks.build_network(
        config.model, num_classes=num_classes, image_shape=image_shape, row_keys=row_keys
    )
    network.check_head(config.model.name, model, num_classes, image_shape)
    found = []
    if config.task == "fit":
        found = look(model, data.example_images, row_keys)
        rows, ranks = len(data.splits.train), membership.ranks_asked_for(config.trainer)
        network.check_single_rows(config, model, data.example_images, rows, ranks)
    data.memory_format = networks.memory_order(config)
    outputs = num_classes if criterion.signature.wants_features else None
    model = networks.lay_out(config.model, model, data.memory_format, exposed=outputs)
    # Lightning would convert after it has loaded a checkpoint, and round float64 on the way.
    dtype = networks.parameter_dtype(config.trainer.precision)
    criterion.to(dtype)
    return model.to(dtype), found


def _board(
    resolved: ResolvedConfig, directory: Path, names: list[str], continued: int | None
) -> RunTensorBoard:
    return RunTensorBoard(
        directory,
        config=resolved.plain,
        config_text=resolved.text,
        metrics=names,
        formulations=resolved.config.parity.formulations,
        first_step=continued,
    )
