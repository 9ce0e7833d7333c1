"""The LightningModule: batch -> logits -> criterion -> log."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from equiloss import randomness
from equiloss.config import Config
from equiloss.data.datasets import Batch
from equiloss.distributed import collectives, interruption
from equiloss.distributed.gradient_sums import GradientSums
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Logits, Outputs, Projection
from equiloss.models.dropout import RowKeys
from equiloss.models.head import features_and_head
from equiloss.training import bitwise, optim
from equiloss.training.about import About
from equiloss.training.metrics import Evaluated, EvaluationMetric
from equiloss.training.state import Clock, Progress, RunState
from equiloss.training.step import GlobalStep, MicroBatches, StepOutcome

log = logging.getLogger(__name__)


class Classifier(LightningModule):
    """Trains and evaluates a network with a criterion.

    Args:
        model: Network, images [N, C, H, W] -> logits [N, K].
        criterion: Loss with its options.
        config: The run's configuration.
        row_keys: Keys from which the network's dropout layers draw their masks.
        num_classes: K.
        split_sizes: Samples of the `train`, `val` and `test` split.
        total_steps: Optimizer steps of a run that goes to its end.
        fingerprint: `Splits.fingerprint`, for checkpoints (None: they say nothing of the data).
        about: What checkpoints say of what they are for (None: nothing).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        config: Config,
        *,
        row_keys: RowKeys,
        num_classes: int,
        split_sizes: dict[str, int],
        total_steps: int,
        fingerprint: dict[str, str] | None = None,
        about: About | None = None,
    ) -> None:
        super().__init__()
        # Gradients are summed over micro-batches and ranks by `GlobalStep`, not by Lightning.
        self.automatic_optimization = False
        self.model = model
        self.criterion = criterion
        self.config = config
        self.row_keys = row_keys
        self.split_sizes = split_sizes
        self.total_steps = total_steps
        self.fingerprint = fingerprint or {}
        self.about = {} if about is None else asdict(about)
        self.evaluation = EvaluationMetric(
            num_classes, criterion.ignore_index, config.metrics.extra
        )
        self.gradient_sums = GradientSums()
        accumulate = (
            bitwise.Shards(self, config.trainer.shards)
            if config.trainer.reduction == "bitwise"
            else MicroBatches(self, config.trainer.micro_batch_size)
        )
        self.step = GlobalStep(self, accumulate, config.optimizer.gradient_clip_norm)
        self.progress = Progress()
        self.clock = Clock()
        self.evaluated: dict[str, Evaluated] = {}
        """The newest evaluation of each split."""
        self._resumed: RunState | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.model(images)
        return logits

    def outputs(self, images: Tensor) -> Outputs:
        """What the loss asks for: logits [N, K], or the head's input and the head."""
        if not self.criterion.signature.wants_features:
            return Logits(self.model(images))
        features, head = features_and_head(self.model)
        return Projection(features(images), head.weight, head.bias)

    @property
    def run_loss(self) -> dict[str, Any]:
        """Name and options of the loss, as plain data."""
        return {"name": self.criterion.name, "options": self.criterion.options}

    @property
    def loss_dtype(self) -> torch.dtype:
        """The dtype in which losses are computed and summed."""
        assert isinstance(self.dtype, torch.dtype)
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def the_optimizer(self) -> LightningOptimizer:
        """The only optimizer, with Lightning's bookkeeping of steps around it."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def setup(self, stage: str) -> None:
        """Make sure that the process group is the one that was asked for.

        From here on, where all ranks have joined, signals wait for the end of a step or batch.
        """
        interruption.wait_for_steps()
        asked, real = self.trainer.world_size, collectives.world_size()
        if real != asked or self.config.trainer.devices not in (real, -1):
            raise RuntimeError(
                f"the process group has {real} ranks, Lightning counts {asked}, and "
                f"trainer.devices is {self.config.trainer.devices}"
            )
        if self.config.trainer.reduction == "bitwise":
            bitwise.check_threads()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule over the run's own number of steps."""
        trainer = self.config.trainer
        fused = trainer.reduction != "bitwise" and trainer.precision != "16-mixed"
        optimizer = optim.build_optimizer(
            self.config.optimizer, self, network=self.model, fused=fused
        )
        scheduler = optim.build_scheduler(
            self.config.scheduler, optimizer, total_steps=self.total_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Note from where training goes on, on how many ranks, and put the generators back."""
        world_size = collectives.world_size()
        self.progress.segments.append({"from_step": self.global_step, "world_size": world_size})
        self.gradient_sums.settle(self.trainer.strategy.model)
        # A run that continues inside an epoch does not start the epoch again.
        self.on_train_epoch_start()
        if self._resumed is not None and len(self._resumed.rng) == world_size:
            randomness.restore(self._resumed.rng[self.global_rank], self.device)
        elif self._resumed is not None or self.global_rank > 0:
            # Ranks that draw by batch must not draw the same.
            randomness.seed_rank(self.config.seed, self.global_step, self.global_rank)
        self._resumed = None

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.clock.start(self.progress.counts)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, StepOutcome]:
        """One optimizer step on this rank's slice of the global batch."""
        step, counts = self.global_step, self.progress.counts
        outcome = self.step.take(batch)
        lr = self.the_optimizer.param_groups[0]["lr"]
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)
        scheduler.step()

        counts.train_seen += batch.rows
        counts.skipped_steps += outcome.skipped
        counts.zero_mass_steps += outcome.mass == 0
        if step % self.config.trainer.log_every_n_steps == 0:
            self.record(
                {
                    "train/loss": outcome.loss,
                    "train/grad_norm": outcome.grad_norm,
                    "train/lr": lr,
                    "train/samples_per_s": self.clock.lap(counts),
                    "train/skipped_steps": float(counts.skipped_steps),
                },
                step,
            )
        return {"outcome": outcome}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Guard the gradient after it was synchronised and unscaled."""
        self.step.guard(optimizer)

    def on_validation_start(self) -> None:
        """Stop the clock, and evaluate the buffers that a checkpoint has: the first rank's."""
        collectives.broadcast_from_first(self.model.buffers())
        if self.trainer.state.fn == "fit":
            self.clock.lap(self.progress.counts)

    def on_validation_end(self) -> None:
        """Start the clock again."""
        if self.trainer.state.fn == "fit":
            self.clock.start(self.progress.counts)

    def on_test_start(self) -> None:
        """Evaluate the buffers that a checkpoint has: the first rank's."""
        collectives.broadcast_from_first(self.model.buffers())

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate this rank's slice of an evaluation batch."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate this rank's slice of an evaluation batch."""
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Work out the validation metrics over all ranks."""
        self._finish_evaluation("val")
        self.progress.counts.validated_step = self.global_step

    def on_test_epoch_end(self) -> None:
        """Work out the test metrics over all ranks."""
        self._finish_evaluation("test")

    def record(self, scalars: dict[str, float], step: int) -> None:
        """Hand named values of an optimizer step to every logger, in full precision."""
        self.progress.scalars.update(scalars)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)

    def run_state(self) -> RunState:
        """What a checkpoint says of the run; every rank must call it."""
        return RunState(
            num_classes=self.evaluation.num_classes,
            split_sizes=self.split_sizes,
            loss=self.run_loss,
            progress=self.progress,
            rng=collectives.gather_objects(randomness.state(self.device)),
            fingerprint=self.fingerprint,
            about=self.about,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are for, and how far the run had come."""
        self.run_state().save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint ended, or refuse to."""
        self._resumed = RunState.load(checkpoint)
        self._resumed.check_same_run(self.run_state())
        self.progress = self._resumed.progress

    def _evaluate(self, batch: Batch) -> Tensor:
        # The validation of a fit goes on to its end: an epoch is saved with it.
        if self.trainer.state.fn != "fit":
            interruption.check()
        return self.evaluate(batch, self.evaluation)

    def evaluate(self, batch: Batch, metric: EvaluationMetric) -> Tensor:
        """Add this rank's slice of an evaluation batch to a metric; returns the logits [n, K]."""
        outputs = self.outputs(batch.images)
        # Ranks of classes and calibration are figures of the logits, whatever the loss takes.
        logits = outputs.logits()
        sums = self.criterion.exact_sum(outputs, batch.target)
        metric.update(logits, batch.target, sums)
        return logits

    def _finish_evaluation(self, split: str) -> None:
        result = self.evaluation.evaluate()
        self.evaluation.reset()
        if result.samples != self.split_sizes[split]:
            raise RuntimeError(
                f"evaluated {result.samples} samples of the {self.split_sizes[split]} in {split}: "
                "each must be evaluated exactly once"
            )
        if not result.confusion.any() and split not in self.evaluated:
            log.warning("no row of the %s split counts: its metrics are not measured", split)
        self.evaluated[split] = result
        self.progress.samples[split] = result.samples
        scalars = {f"{split}/{name}": value for name, value in result.scalars.items()}
        self.record(scalars, max(self.global_step - 1, 0))
        # For callbacks that monitor a metric. The values are the same on every rank already.
        self.log_dict(scalars, logger=False)
