"""What a network does, looked at before the first step."""

from __future__ import annotations

import logging

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from equiloss.config import Config
from equiloss.errors import ConfigError, ModelError, first_line
from equiloss.models.dropout import KeyedDropout

log = logging.getLogger(__name__)


def check(
    config: Config, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Refuse a network that does not fit the data, or whose bits would depend on the devices.

    Raises:
        ModelError: as `check_head` does.
        ConfigError: for batch statistics with trainer.reduction=bitwise.
    """
    check_head(config.model.name, model, num_classes, image_shape)
    if has_batch_statistics(model) and config.trainer.reduction == "bitwise":
        raise ConfigError(
            f"trainer.reduction=bitwise: model {config.model.name!r} normalises over the batch, "
            "and a shard would have statistics of its own; use group or layer normalisation"
        )


def check_head(
    name: str, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Run a network on one blank image, and check that its head fits the data's classes.

    Args:
        name: The network's name, for error messages.
        model: Lazy layers of it get their sizes.
        num_classes: K.
        image_shape: (C, H, W) of one image.

    Raises:
        ModelError: for images that it cannot process, or logits of another shape than [N, K].
    """
    was_training = model.training
    model.eval()  # one row has no batch statistics
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *image_shape))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        size = "x".join(map(str, image_shape))
        raise ModelError(
            f"model {name!r} cannot process {size} images: {first_line(error)} "
            "(data.image_size=… resizes them)"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"model {name!r} gives {got} logits per image where the data has {num_classes} "
            "classes: its head must give one logit per class"
        )


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a row's logits depend on the other rows of its batch while training."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def draws_by_batch(model: nn.Module) -> list[str]:
    """Types of layers in a network whose random numbers depend on how its batch is split."""
    return sorted({type(m).__name__ for m in model.modules() if _draws_by_batch(m)})


def _draws_by_batch(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0 and not isinstance(module, KeyedDropout)
    # torchvision's, known by name: its import takes a second.
    return type(module).__name__ == "StochasticDepth"


def warn(config: Config, trainer: Trainer, model: nn.Module) -> None:
    """Say where results depend on how the work is split."""
    name, micro_batches = config.model.name, config.trainer.micro_batch_size is not None
    if has_batch_statistics(model):
        if trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            log.warning(
                "model %r normalises over the batch: each rank uses the statistics of its own "
                "slice (SyncBatchNorm exists for GPUs only), so results depend on trainer.devices",
                name,
            )
        if micro_batches:
            log.warning(
                "model %r normalises over the batch: trainer.micro_batch_size changes its "
                "statistics, and with them the result",
                name,
            )
    layers = draws_by_batch(model)
    if layers and (trainer.world_size > 1 or micro_batches):
        log.warning(
            "model %r draws random numbers by batch (%s): results depend on trainer.devices and "
            "trainer.micro_batch_size (torch.nn.Dropout draws by sample here, and does not)",
            name,
            ", ".join(layers),
        )
