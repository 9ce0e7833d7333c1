"""Networks by name: images [N, C, H, W] -> logits [N, K].

Those of `equiloss.models.networks`, anything of torchvision and timm by its own name, and anything
else through `model=custom`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from equiloss.config import Config, ModelConfig
from equiloss.config.network import OWN
from equiloss.errors import ModelError, UserError, first_line
from equiloss.imports import import_target
from equiloss.models import freezing, timm
from equiloss.models.dropout import RowKeys, key_dropout
from equiloss.models.head import expose_head
from equiloss.models.networks import MLP, ConvNet
from equiloss.models.published import torchvision_models

# Arguments of torchvision's and timm's networks that are not the user's.
FIXED = {
    "num_classes": "it is the number of classes in the data",
    "in_chans": "it is the number of channels in the data",
    **dict.fromkeys(
        (
            *("weights", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
            *("checkpoint_path", "cache_dir"),
        ),
        "model.weights names the weights to start from",
    ),
}
# What Python says of an option that a function does not take.
UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


def build_network(
    config: ModelConfig,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    row_keys: RowKeys,
) -> nn.Module:
    """Build the configured network.

    Args:
        config: Name and options.
        num_classes: K.
        image_shape: (C, H, W) of one image.
        row_keys: Keys from which its dropout layers draw their masks.

    Raises:
        ModelError: for an unknown name (with the near miss), options that the network does not
            take, or what is no network.
        ConfigError: for a part to freeze that it does not have.
    """
    channels, height, width = image_shape
    options = dict(config.options)
    make: Callable[..., Any] = partial(_torchvision, config.name)
    sizes: tuple[int, ...] = (num_classes, channels)
    if config.library == "timm":
        make = partial(timm.network, config.name)
    elif config.name == "convnet":
        make = ConvNet
    elif config.name == "mlp":
        make, sizes = MLP, (num_classes, channels * height * width)
    elif config.name == "custom":
        function = import_target(str(config.target), "model.target", ModelError)
        make, sizes = partial(function, num_classes=num_classes, in_channels=channels), ()
    of_library = config.library == "timm" or config.name not in OWN
    for key in filter(FIXED.get, options) if of_library else ():
        raise ModelError(f"model.options.{key} cannot be set: {FIXED[key]}")
    try:
        model = make(*sizes, **options)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and config.name == "custom":
            raise  # a fault of that code, and not of its options
        found = UNKNOWN.search(str(error))
        own = found and found[1] in options  # and not one of a call inside
        why = f"it has no option {found[1]!r}" if found and own else first_line(error)
        raise ModelError(f"model {config.name!r} with options {options}: {why}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {config.name!r} is a {type(model).__name__}, not an nn.Module")
    key_dropout(model, row_keys)
    freezing.freeze(config, model, num_classes)
    return model


def memory_order(config: Config) -> torch.memory_format:
    """The order of images and weights in memory.

    Where `model.channels_last` is auto, it is NHWC for what was measured to be faster with it: the
    shipped convnet in float32 on a CPU (docs/performance.md). It stays NCHW under
    `trainer.reduction=bitwise`.
    """
    last = config.model.channels_last
    if last == "auto":
        options = config.trainer
        here = options.accelerator == "cpu" and options.precision == "32-true"
        last = config.model.name == "convnet" and here and options.reduction != "bitwise"
    return torch.channels_last if last else torch.contiguous_format


def lay_out(
    config: ModelConfig, model: nn.Module, order: torch.memory_format, *, exposed: int | None = None
) -> nn.Module:
    """Put the weights of a network into an order in memory, and compile it if that is wanted.

    Args:
        config: Name and `compile`.
        model: The network.
        order: Of its weights.
        exposed: Outputs of its head, for a loss that asks for features and head.

    Raises:
        ModelError: for a network without such a head.
    """
    if order == torch.channels_last:
        model = model.to(memory_format=order)
    if config.compile:
        model.compile()
    if exposed is not None:
        expose_head(config.name, model, exposed, compiled=config.compile)
    return model


def _torchvision(name: str, num_classes: int, channels: int, /, **options: Any) -> nn.Module:
    models = torchvision_models(name)
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return a second set of logits while training.
        options = {"aux_logits": False, "init_weights": True, **options}
    if options.get("transform_input") and channels != 3:
        raise ModelError(
            f"model.options.transform_input is for 3 channels, and the images have {channels}: set "
            "it to false"
        )
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    _fit_stem(model, channels)
    return model


def _fit_stem(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes `channels` instead of 3."""
    convolutions = (pair for pair in model.named_modules() if isinstance(pair[1], nn.Conv2d))
    path, stem = next(convolutions, ("", None))
    if not isinstance(stem, nn.Conv2d) or stem.in_channels == channels:
        return
    parent, _, attribute = path.rpartition(".")
    fitted = nn.Conv2d(
        channels,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    setattr(model.get_submodule(parent), attribute, fitted)


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of a network's parameters under `trainer.precision`."""
    of_parameters = {
        "64-true": torch.float64,
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
    }
    return of_parameters.get(precision, torch.float32)
