"""The configuration against the data, the loss and Lightning's Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from equiloss.config import Config, TrainerConfig
from equiloss.errors import ConfigError, LossError, UserError, first_line, unknown
from equiloss.losses import registry
from equiloss.losses.criterion import Criterion
from equiloss.losses.registry import CUSTOM


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


def check_losses(config: Config, criterion: Criterion, num_classes: int) -> None:
    """Refuse a loss whose options do not go with the data, and formulations that are not there.

    Raises:
        LossError: for options of another number of classes.
        ConfigError: for mixed targets that the loss does not take, and for a formulation that
            nobody provides, in a run that is going to compare it.
    """
    criterion.check_classes(num_classes)
    if config.data.augment.mixes and not criterion.signature.soft_targets:
        raise ConfigError(
            f"data.augment.mixup and cutmix turn classes into probabilities, and loss "
            f"{criterion.name!r} takes classes: use one with soft targets, such as cross_entropy"
        )
    if config.task != "fit" or config.parity.every_n_steps == 0:
        return
    trained = [CUSTOM] if criterion.name == CUSTOM else []
    for name in config.parity.formulations:
        if name not in (*registry.names(), *trained):
            raise ConfigError(unknown("parity.formulations", name, [*_of_logits(), *trained]))


def _of_logits() -> Iterator[str]:
    """Registered losses that a check can evaluate on logits."""
    for name in registry.names():
        with suppress(LossError):  # a broken plugin's
            if not registry.signature(name).wants_features:
                yield name


def refusal(config: TrainerConfig, error: Exception) -> ConfigError:
    """The error of a configuration that Lightning's Trainer has refused.

    The culprit is found by its effect: an argument that a Trainer refuses by itself.

    Raises:
        Exception: the one given, where no argument is to blame.
    """
    if isinstance(error, UserError):
        raise error  # of a callback, which names its own culprit
    for name, value in config.arguments.items():
        try:
            Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **{name: value},
            )
        except Exception as own:  # Lightning checks its arguments in many ways
            return ConfigError(f"+trainer.{name}={value} is refused: {first_line(own)}")
    if not isinstance(error, (MisconfigurationException, ValueError)):
        raise error  # none of the user's
    given = {"accelerator": config.accelerator, "devices": config.devices}
    words = [f"trainer.{key}={value}" for key, value in given.items()]
    return ConfigError(f"{' '.join(words)}: {first_line(error)}")
