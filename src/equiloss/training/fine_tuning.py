"""A run that does not teach all of its network alike: what it says, and when it unfreezes."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from equiloss.config import OptimizerConfig
from equiloss.models import freezing
from equiloss.training import parameter_groups

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

log = logging.getLogger(__name__)


class FineTuning(Callback):
    """Says what learns, and at which rates; has what is frozen learn after its epochs.

    Args:
        config: The optimizer's.
        network: What is trained.

    Raises:
        ConfigError: for a group whose pattern matches nothing, before the run writes a file.
    """

    def __init__(self, config: OptimizerConfig, network: nn.Module) -> None:
        parameter_groups.grouped(config, network, network)

    def on_fit_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Leave out what Lightning says of modules that evaluate: the run says why they do."""
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Begin, or go on inside an epoch, which does not start again.

        The classifier settles the buckets afterwards, as at any start: torch bears it once.
        """
        self._unfreeze(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        config, network = pl_module.config, pl_module.model
        if config.model.freeze is not None:
            log.info("%s", freezing.described(config.model, network))
        if config.optimizer.groups:
            for group in parameter_groups.grouped(config.optimizer, pl_module, network):
                log.info("optimizer.groups: %s", group)
        epochs = config.model.unfreeze_after_epochs
        if epochs is not None and pl_module.total_steps <= epochs * trainer.num_training_batches:
            log.warning(
                "model.unfreeze_after_epochs=%d: the run ends before, after %d steps of %d an "
                "epoch",
                epochs,
                pl_module.total_steps,
                trainer.num_training_batches,
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Unfreeze between two epochs."""
        if self._unfreeze(trainer, pl_module):
            pl_module.gradient_sums.settle(trainer.strategy.model)
            if trainer.is_global_zero:
                log.info("%s", freezing.described(pl_module.config.model, pl_module.model))

    def _unfreeze(self, trainer: Trainer, pl_module: Classifier) -> bool:
        """Have everything learn if it is time and has not been done; every rank must call it."""
        epochs = pl_module.config.model.unfreeze_after_epochs
        if epochs is None or trainer.current_epoch < epochs:
            return False
        changed = freezing.unfreeze(pl_module.model)
        if changed:
            _wrap_anew(trainer.strategy)
        return changed


def _wrap_anew(strategy: Strategy) -> None:
    """Have data-parallel training sum the gradients of what learns now.

    DistributedDataParallel does so for the parameters that learn when it is made.
    """
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.model.module
        strategy.configure_ddp()
