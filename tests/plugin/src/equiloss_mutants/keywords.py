"""Mistakes about options."""

import functools
from typing import Literal

import torch.nn.functional as F
from torch import nn


def unwritten_choice(logits, target, *, kind: Literal["sum", "max"] = "sum"):
    losses = F.cross_entropy(logits, target, reduction="none")
    return {"sum": losses}[kind]


def _without_unknown_options(loss):
    @functools.wraps(loss)
    def call(logits, target, **options):
        return loss(logits, target, **{key: options[key] for key in options if key == "scale"})

    return call


@_without_unknown_options
def swallows(logits, target, *, scale: float = 1.0):
    return scale * F.cross_entropy(logits, target, reduction="none")


class AnotherDefault(nn.Module):
    """What its signature promises is not what it does when nothing is said."""

    def __init__(self, *, scale: float = 1.0, **never: float) -> None:
        super().__init__()


_init = nn.Module.__init__


def _made(self, *args, **options):
    _init(self)
    self.scale = options.get("scale", 2.0)


def _signature(self, *, scale: float = 1.0) -> None: ...


AnotherDefault.__init__ = functools.wraps(_signature)(_made)
AnotherDefault.forward = lambda self, logits, target: (
    self.scale * F.cross_entropy(logits, target, reduction="none")
)
