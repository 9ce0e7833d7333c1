"""The LightningModule: batch -> logits -> criterion -> log."""

from __future__ import annotations

import time
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
from equiloss.distributed import collectives
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Projection
from equiloss.models.dropout import RowKeys
from equiloss.training import optim
from equiloss.training.bitwise import BitwiseStep
from equiloss.training.metrics import Evaluated, EvaluationMetric
from equiloss.training.state import RunState
from equiloss.training.step import GlobalStep, StepOutcome

COUNTS = ("train_seen", "skipped_steps", "zero_mass_steps", "train_seconds", "validated_step")


class Classifier(LightningModule):
    """Trains and evaluates a network with a criterion.

    Args:
        model: Network, images [N, C, H, W] -> logits [N, K].
        criterion: Loss with its options.
        config: The run's configuration.
        rows: What the network's dropout layers are told of the rows under way.
        num_classes: K.
        split_sizes: Samples of the `train`, `val` and `test` split.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        config: Config,
        *,
        rows: RowKeys,
        num_classes: int,
        split_sizes: dict[str, int],
    ) -> None:
        super().__init__()
        # Gradients are summed over micro-batches and ranks by `GlobalStep`, not by Lightning.
        self.automatic_optimization = False
        self.model = model
        self.criterion = criterion
        self.config = config
        self.rows = rows
        self.split_sizes = split_sizes
        self.evaluation = EvaluationMetric(num_classes, criterion.ignore_index)
        clip_norm = config.optimizer.gradient_clip_norm
        self.step = (
            BitwiseStep(self, config.trainer.shards, clip_norm)
            if config.trainer.reduction == "bitwise"
            else GlobalStep(self, config.trainer.micro_batch_size, clip_norm)
        )
        self.scalars: dict[str, float] = {}
        """The newest value of every metric, by its logged name."""
        self.evaluated: dict[str, Evaluated] = {}
        """The newest evaluation of each split."""
        self.samples: dict[str, int] = {}
        """Samples evaluated of each split, in its newest evaluation."""
        self.segments: list[dict[str, int]] = []
        """From which step on how many ranks trained."""
        self.validated_step = -1
        """Optimizer steps taken when the newest validation ended."""
        self.training_began = 0.0
        """Reading of time.perf_counter when training began."""
        self.train_seen = 0
        self.skipped_steps = 0
        self.zero_mass_steps = 0
        self.train_seconds = 0.0
        self._since = (0.0, 0)
        self._saved: RunState | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.model(images)
        return logits

    def outputs(self, images: Tensor) -> Tensor | Projection:
        """What the loss asks for: logits [N, K], or the head's input and the head."""
        if not self.criterion.signature.wants_features:
            logits: Tensor = self.model(images)
            return logits
        features: Any = self.model.forward_features
        head: Any = self.model.head
        return Projection(features(images), head.weight, head.bias)

    @property
    def loss_dtype(self) -> torch.dtype:
        """The dtype in which losses are computed and summed."""
        assert isinstance(self.dtype, torch.dtype)
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def step_index(self) -> int:
        """Index of the optimizer step under way; the first is 0."""
        return self.global_step

    @property
    def the_optimizer(self) -> LightningOptimizer:
        """The only optimizer, with Lightning's bookkeeping of steps around it."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def setup(self, stage: str) -> None:
        """Make sure that the process group is the one that was asked for."""
        asked, real = self.trainer.world_size, collectives.world_size()
        if real != asked or self.config.trainer.devices not in (real, -1):
            raise RuntimeError(
                f"the process group has {real} ranks, Lightning counts {asked}, and "
                f"trainer.devices is {self.config.trainer.devices}"
            )
        self.step.check()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule over the run's own number of steps."""
        optimizer = optim.build_optimizer(self.config.optimizer, self)
        steps = optim.total_steps(
            self.config.trainer,
            train_samples=self.split_sizes["train"],
            batch_size=self.config.data.batch_size,
        )
        scheduler = optim.build_scheduler(self.config.scheduler, optimizer, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Note when and from where training began, on how many ranks."""
        self.training_began = time.perf_counter()
        self.segments.append({"from_step": self.step_index, "world_size": collectives.world_size()})
        # A run that continues inside an epoch does not start the epoch again.
        self.on_train_epoch_start()
        if self._saved is not None and len(self._saved.rng) == collectives.world_size():
            randomness.restore(self._saved.rng[self.global_rank], self.device)
        elif self._saved is not None or self.global_rank > 0:
            # Ranks that draw by batch must not draw the same.
            randomness.seed_rank(self.config.seed, self.step_index, self.global_rank)
        self._saved = None

    def on_train_epoch_start(self) -> None:
        """Start the clock: it measures training without the evaluations between epochs."""
        self._since = (time.perf_counter(), self.train_seen)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, StepOutcome]:
        """One optimizer step on this rank's slice of the global batch."""
        step = self.step_index
        outcome = self.step.take(batch)
        lr = self.the_optimizer.param_groups[0]["lr"]
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)
        scheduler.step()

        size = self.config.data.batch_size
        self.train_seen += min(size, self.split_sizes["train"] - batch_idx * size)
        self.skipped_steps += outcome.skipped
        self.zero_mass_steps += outcome.mass == 0
        if step % self.config.trainer.log_every_n_steps == 0:
            self.record(
                {
                    "train/loss": outcome.loss,
                    "train/grad_norm": outcome.grad_norm,
                    "train/lr": lr,
                    "train/samples_per_s": self._throughput(),
                    "train/skipped_steps": float(self.skipped_steps),
                },
                step,
            )
        return {"outcome": outcome}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Guard the gradient after it was synchronised and unscaled."""
        self.step.guard(optimizer)

    def on_validation_start(self) -> None:
        """Stop the clock."""
        if self.trainer.state.fn == "fit":
            self._throughput()

    def on_validation_end(self) -> None:
        """Start the clock again."""
        self._since = (time.perf_counter(), self.train_seen)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate this rank's slice of an evaluation batch."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate this rank's slice of an evaluation batch."""
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Work out the validation metrics over all ranks."""
        self._finish_evaluation("val")
        self.validated_step = self.global_step

    def on_test_epoch_end(self) -> None:
        """Work out the test metrics over all ranks."""
        self._finish_evaluation("test")

    def record(self, scalars: dict[str, float], step: int) -> None:
        """Hand named values of an optimizer step to every logger, in full precision."""
        self.scalars.update(scalars)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)

    def split_scalars(self, split: str) -> dict[str, float]:
        """The newest values of one split, by their logged names."""
        return {n: value for n, value in self.scalars.items() if n.startswith(f"{split}/")}

    def run_state(self) -> RunState:
        """What a checkpoint says of the run; every rank must call it."""
        return RunState(
            num_classes=self.evaluation.num_classes,
            split_sizes=self.split_sizes,
            loss={"name": self.criterion.name, "options": self.criterion.options},
            scalars=self.scalars,
            samples=self.samples,
            counts={name: getattr(self, name) for name in COUNTS},
            segments=self.segments,
            rng=collectives.gather_objects(randomness.state(self.device)),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are for, and how far the run had come."""
        self.run_state().save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint ended, or refuse to."""
        saved = RunState.load(checkpoint)
        saved.check_same_run(self.run_state())
        for name, value in saved.counts.items():
            setattr(self, name, value)
        self.scalars = saved.scalars
        self.samples = saved.samples
        self.segments = saved.segments
        self._saved = saved

    def _evaluate(self, batch: Batch) -> Tensor:
        outputs = self.outputs(batch.images)
        # Ranks of classes and calibration are figures of the logits, whatever the loss takes.
        logits = outputs.logits() if isinstance(outputs, Projection) else outputs
        self.evaluation.update(logits, batch.target, self.criterion(outputs, batch.target))
        return logits

    def _finish_evaluation(self, split: str) -> None:
        result = self.evaluation.evaluate()
        self.evaluation.reset()
        if result.samples != self.split_sizes[split]:
            raise RuntimeError(
                f"evaluated {result.samples} samples of the {self.split_sizes[split]} in {split}: "
                "each must be evaluated exactly once"
            )
        self.evaluated[split] = result
        self.samples[split] = result.samples
        scalars = {f"{split}/{name}": value for name, value in result.scalars.items()}
        self.record(scalars, max(self.step_index - 1, 0))
        # For callbacks that monitor a metric. The values are the same on every rank already.
        self.log_dict(scalars, logger=False)

    def _throughput(self) -> float:
        """Samples per second over all ranks since the last call."""
        now = time.perf_counter()
        then, seen = self._since
        self._since = (now, self.train_seen)
        self.train_seconds += now - then
        return (self.train_seen - seen) / (now - then) if now > then else 0.0
