"""Networks by name: images [N, C, H, W] -> logits [N, K].

The networks written here use group and layer normalisation, so that no row's logits depend on
the rows beside it: a step is then the same however its batch is split. Anything of torchvision
goes by its own name, anything else through `model=custom`.

A network that exposes `forward_features` and `head` lets a loss ask for the head's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiloss.config import ModelConfig
from equiloss.dropout import RowKeys, key_dropout
from equiloss.errors import UserError, unknown
from equiloss.imports import import_target


class ModelError(UserError):
    """A network that is unknown, or does not fit the data."""


class ConvNet(nn.Module):
    """Stages of two 3x3 convolutions with group normalisation, then pooling over all places.

    Each stage halves height and width after its first convolution, so that the second costs a
    quarter. The head sees both the average and the maximum of each channel: on the digits the
    first generalises better, on larger images the second learns faster.

    Args:
        num_classes: K.
        in_channels: C.
        widths: Channels of each stage; divisible by `groups`.
        groups: Groups of the normalisation (Wu & He, "Group Normalization", ECCV 2018).
        dropout: Share of the pooled features that are dropped in training.

    >>> ConvNet(num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        widths: Sequence[int] = (32, 64),
        groups: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.GroupNorm(groups, width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.GroupNorm(groups, width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.stages = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features, the head's input: [N, C, H, W] -> [N, D]."""
        maps = self.stages(images)  # [N, C, H, W] -> [N, D/2, H', W']
        features: Tensor = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        dropped: Tensor = self.dropout(features)
        return dropped

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.head(self.forward_features(images))
        return logits


class MLP(nn.Module):
    """Hidden layers with layer normalisation on the flattened image.

    Args:
        num_classes: K.
        in_features: C · H · W.
        widths: Units of each hidden layer.
        dropout: Share of each layer's units that are dropped in training.

    >>> MLP(num_classes=10, in_features=64)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        widths: Sequence[int] = (128, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        units = in_features
        for width in widths:
            layers += [nn.Linear(units, width), nn.LayerNorm(width), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(dropout)]
            units = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(units, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last hidden layer: [N, C, H, W] -> [N, D]."""
        features: Tensor = self.hidden(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.head(self.forward_features(images))
        return logits


def build(
    config: ModelConfig,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    rows: RowKeys,
) -> nn.Module:
    """Build the configured network and check that its head fits the data's classes.

    Args:
        config: Name and options.
        num_classes: K.
        image_shape: (C, H, W) of one image.
        rows: What its dropout layers are told of the rows under way.

    Raises:
        ModelError: for an unknown name (with the near miss), options that the network does not
            take, images that it cannot process, or logits of another shape than [N, K].
    """
    channels, height, width = image_shape
    options = dict(config.options)
    make: Callable[[], nn.Module]
    if config.name == "convnet":
        make = lambda: ConvNet(num_classes, channels, **options)  # noqa: E731
    elif config.name == "mlp":
        make = lambda: MLP(num_classes, channels * height * width, **options)  # noqa: E731
    elif config.name == "custom":
        function = import_target(str(config.target), "model.target", ModelError)
        make = lambda: function(num_classes=num_classes, in_channels=channels, **options)  # noqa: E731
    else:
        make = lambda: _torchvision(config.name, num_classes, channels, options)  # noqa: E731
    try:
        model = make()
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise ModelError(f"model {config.name!r} with options {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {config.name!r} is a {type(model).__name__}, not an nn.Module")
    key_dropout(model, rows)
    _check_head(config.name, model, num_classes, image_shape)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    return model


def expose_head(name: str, model: nn.Module, num_classes: int, *, compiled: bool = False) -> None:
    """Make sure that a network has `forward_features` and a linear `head`, for losses that ask.

    A network of torchvision gets both: its last linear layer is the head, and its features are
    what that layer is given.

    Args:
        name: The network's name, for error messages.
        model: Changed in place; names in its state_dict stay.
        num_classes: K.
        compiled: Whether features go through torch.compile.

    Raises:
        ModelError: for a network without a linear head of K outputs.
    """
    if not hasattr(model, "forward_features"):
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if heads and heads[-1].out_features == num_classes:
            last = heads[-1]
            # The layer itself stays, with its name and its parameters.
            last.__class__ = _Head
            # Past nn.Module's own: the head has a place in the network already.
            object.__setattr__(model, "head", last)
            object.__setattr__(model, "forward_features", lambda images: _features(model, images))
    features: Any = getattr(model, "forward_features", None)
    if features is None or not isinstance(getattr(model, "head", None), nn.Linear):
        raise ModelError(
            f"model {name!r} has no linear head that gives the logits, which this loss asks for: "
            "a network of your own exposes `forward_features` and `head` (an nn.Linear)"
        )
    if compiled:
        object.__setattr__(model, "forward_features", torch.compile(features))


class _Head(nn.Linear):
    """A linear layer that can let its input through."""

    bypassed = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        return input if self.bypassed else super().forward(input)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head of a network of torchvision is given: [N, C, H, W] -> [N, D]."""
    head = model.head
    assert isinstance(head, _Head)
    head.bypassed = True
    try:
        features: Tensor = model(images)
    finally:
        head.bypassed = False
    return features


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a row's logits depend on the other rows of its batch while training."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _torchvision(
    name: str, num_classes: int, channels: int, options: dict[str, object]
) -> nn.Module:
    # Imported here: torchvision is slow to import, and the small networks do without it.
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(unknown("model", name, ["convnet", "mlp", "custom", *known]))
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return a second set of logits while training.
        options = {"aux_logits": False, "init_weights": True, **options}
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


def _check_head(
    name: str, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    was_training = model.training
    model.eval()  # one row has no batch statistics
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *image_shape))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        size = "x".join(map(str, image_shape))
        raise ModelError(
            f"model {name!r} cannot process {size} images: {_first_line(error)} "
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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
