"""Averaged weights, `ema.decay`: an exponential moving average beside the weights that train.

    average <- d · average + (1 - d) · weights

after each optimizer step, from the weights before the first one on. Source: Polyak & Juditsky,
"Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992.

- Averaged are the network's parameters, in their own dtype, and in float32 where that is half
  precision: there a thousandth of a weight's change would be rounded away. A parameter that does
  not learn is its own average to the bit.
- Buffers are not averaged: the averaged weights are evaluated and saved with the current ones, as
  torch.optim.swa_utils.AveragedModel does it. Running statistics are moving averages already.
  Nor are the parameters of a loss: it is no part of what is used later.
- A step that the scaler of 16-mixed held back leaves no new weights, and is not averaged.
- All ranks have the same weights, and so the same averages: nothing is sent.

Lightning's `EMAWeightAveraging` (2.6) resumes to the bit too, but it validates the averages instead
of the weights; a checkpoint of weights alone, as best.ckpt is one, then holds the weights under the
averages' figures; it counts the steps that a scaler held back; and its decay does not warm up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from equiloss.config import Config, EmaConfig
from equiloss.config.metrics import AVERAGED_METRICS
from equiloss.errors import CheckpointError
from equiloss.records.run_dir import CHECKPOINTS, EMA
from equiloss.records.writing import writing
from equiloss.training.metrics import EvaluationMetric

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.classifier import Classifier
    from equiloss.training.step import StepOutcome

log = logging.getLogger(__name__)


def decay_at(step: int, config: EmaConfig) -> float:
    """What stays of the average at a step, the first of which is 0.

    Source of the warm-up: TensorFlow, `tf.train.ExponentialMovingAverage` with `num_updates`.

    >>> [round(decay_at(step, EmaConfig(decay=0.9)), 3) for step in (0, 1, 10, 100)]
    [0.1, 0.182, 0.55, 0.9]
    """
    assert config.decay is not None
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Averaging(Callback):
    """Averages the weights of a fit, validates the averages in the same pass, and saves them.

    Validations log `val/ema_loss`, `val/ema_nll` and `val/ema_acc`, exact over all ranks as those
    of the raw weights, and leave the averages in `checkpoints/ema.ckpt`, a checkpoint as best.ckpt
    is. A full state carries the averages, and a run goes on with them to the bit.

    Args:
        config: Decay and warm-up; the decay is not None.
        directory: The run directory.
    """

    def __init__(self, config: EmaConfig, directory: Path) -> None:
        self.config = config
        self.path = directory / CHECKPOINTS / EMA
        self.steps = 0
        """Optimizer steps that were averaged."""
        self.averages: dict[str, Tensor] = {}
        """By the parameter's name in the network; of a fit, once it has started."""
        self._parameters: list[nn.Parameter] = []
        self._resumed: dict[str, Tensor] = {}
        self._evaluation: EvaluationMetric | None = None

    @classmethod
    def of_run(cls, config: Config, directory: Path) -> Averaging | None:
        """What averages the weights of a run; None where nothing does."""
        averages = config.task == "fit" and config.ema.decay is not None
        return cls(config.ema, directory) if averages else None

    def on_fit_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Begin with the weights as they are, or go on with the averages of a checkpoint."""
        named = {n: p for n, p in pl_module.model.named_parameters() if p.is_floating_point()}
        self._parameters = list(named.values())
        for name, parameter in named.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.averages[name] = parameter.detach().to(dtype, copy=True)
        for name, average in self._resumed.items():
            self.averages[name].copy_(average)
        self._resumed = {}
        if trainer.is_global_zero:
            log.info(
                "averaging the weights with decay %g%s: val/ema_… and %s are of the averages",
                self.config.decay,
                ", which warms up" if self.config.warmup else "",
                self.path,
            )

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, outputs: Mapping[str, StepOutcome], *_: Any
    ) -> None:
        """Average the weights that the step has left; a state is saved after this."""
        if outputs["outcome"].skipped:
            return
        averages = list(self.averages.values())
        pairs = zip(self._parameters, averages, strict=True)
        current = [parameter.detach().to(average.dtype) for parameter, average in pairs]
        decay = decay_at(self.steps, self.config)
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(averages, current, self.steps)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the network hold the averages while the context lasts; no weight is copied."""
        weights = [parameter.data for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, own in zip(self._parameters, weights, strict=True):
                parameter.data = own

    def on_validation_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Begin to add up."""
        raw = pl_module.evaluation
        self._evaluation = EvaluationMetric(raw.num_classes, raw.ignore_index).to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, outputs: Tensor, batch: Batch, *_: Any
    ) -> None:
        """Evaluate the averages on the batch that the weights were evaluated on."""
        assert self._evaluation is not None
        with trainer.precision_plugin.val_step_context(), self.in_place():
            pl_module.evaluate(batch, self._evaluation)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Log the figures of the averages over all ranks."""
        assert self._evaluation is not None
        found = self._evaluation.evaluate().scalars
        scalars = {f"val/{name}": found[name.removeprefix("ema_")] for name in AVERAGED_METRICS}
        pl_module.record(scalars, max(pl_module.global_step - 1, 0))
        # For callbacks that monitor a metric, as the raw weights' are.
        pl_module.log_dict(scalars, logger=False)

    def on_validation_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Save the averages as the weights of a checkpoint."""
        with writing(self.path), self.in_place():
            trainer.save_checkpoint(self.path, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and of how many steps they are."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; the network comes to its device after this."""
        self.steps, self._resumed = state_dict["steps"], state_dict["averages"]

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a state that has no averages.

        Raises:
            CheckpointError: saying so.
        """
        if self.state_key not in checkpoint["callbacks"]:
            raise CheckpointError(
                f"cannot continue: ema.decay is {self.config.decay} now, and the checkpoint has no "
                "averaged weights; start anew with another hydra.run.dir=…"
            )


@contextmanager
def measured_by(metric: str, trainer: Trainer) -> Iterator[None]:
    """Have the network hold the weights that a metric measures: the averages for `val/ema_…`."""
    of_averages = metric.removeprefix("val/") in AVERAGED_METRICS
    found = (each for each in trainer.callbacks if isinstance(each, Averaging))  # type: ignore[attr-defined]
    averaging = next(found, None) if of_averages else None
    with averaging.in_place() if averaging else nullcontext():
        yield
