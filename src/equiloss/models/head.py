"""A network's head, the layer that gives the logits: where it is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equiloss.errors import ModelError

# Where a network has its features and its head.
EXPOSED = "_equiloss_exposed"


def paths_of(model: nn.Module, num_classes: int) -> list[str]:
    """Paths of a network's heads: its last module with a weight of K rows, if it has one.

    A network of timm may have several, and give the mean of their logits: it lists them.

    >>> paths_of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Tanh()), num_classes=2)
    ['1']
    """
    found = [
        path
        for path, module in model.named_modules()
        if any(p.ndim >= 2 and len(p) == num_classes for p in module.parameters(recurse=False))
    ]
    # Beyond its `get_classifier()`: of volo also the auxiliary head, which is in the logits.
    timms: Any = getattr(model, "pretrained_cfg", None)
    listed = timms.get("classifier") if isinstance(timms, dict) else None
    listed = [listed] if isinstance(listed, str) else listed or ()
    return [path for path in found if path in listed] or found[-1:]


def expose_head(name: str, model: nn.Module, num_classes: int, *, compiled: bool = False) -> None:
    """Find a network's features and its linear head, for losses that ask.

    A network of torchvision or timm gets both: its last linear layer is the head, and its features
    are what that layer is given. (timm's own `forward_features` are not those.)

    Args:
        name: The network's name, for error messages.
        model: Gets them for `features_and_head`; names in its state_dict stay.
        num_classes: K.
        compiled: Whether features go through torch.compile.

    Raises:
        ModelError: for a network without a linear head of K outputs.
    """
    of_timm = type(model).__module__.startswith("timm.")
    features: Any = None if of_timm else getattr(model, "forward_features", None)
    head: Any = getattr(model, "head", None)
    if features is None:
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
        head = heads[-1] if heads and heads[-1].out_features == num_classes else None
        classifier: Any = getattr(model, "get_classifier", None)
        if of_timm and classifier() is not head:
            head = None  # some have two, and the mean of their logits
        if head is not None:
            # The layer itself stays, with its name and its parameters.
            head.__class__ = _Head
            features = partial(_features, model, head)
    if features is None or not isinstance(head, nn.Linear):
        raise ModelError(
            f"model {name!r} has no linear head that gives the logits, which this loss asks for: "
            "a network of your own exposes `forward_features` and `head` (an nn.Linear)"
        )
    # Past nn.Module's own: the head has a place in the network already.
    object.__setattr__(model, EXPOSED, (torch.compile(features) if compiled else features, head))


def features_and_head(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """What `expose_head` has found: images [N, C, H, W] -> features [N, D], and the head."""
    exposed: tuple[Callable[[Tensor], Tensor], nn.Linear] = getattr(model, EXPOSED)
    return exposed


class _Head(nn.Linear):
    """A linear layer that can let its input through."""

    bypassed = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        return input if self.bypassed else super().forward(input)


def _features(model: nn.Module, head: _Head, images: Tensor) -> Tensor:
    """What the head of a network of torchvision or timm is given: [N, C, H, W] -> [N, D]."""
    head.bypassed = True
    try:
        features: Tensor = model(images)
    finally:
        head.bypassed = False
    return features
