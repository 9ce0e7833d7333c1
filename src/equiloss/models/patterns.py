"""Parameters by pattern: what `model.freeze` and `optimizer.groups` name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from equiloss.errors import ConfigError, unknown


def named_by(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a pattern names: as they are, or as the module that they are below.

    `*` stands for any letters, `?` for one and `[…]` for one of some, as in the standard library's
    `fnmatch`; a dot is a letter like any other.

    >>> names = ["stem.weight", "layer1.0.weight", "layer1.0.bias", "layer10.weight"]
    >>> named_by("layer1", names)
    ['layer1.0.weight', 'layer1.0.bias']
    >>> named_by("*.bias", names)
    ['layer1.0.bias']
    """
    below = f"{pattern}.*"
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, below)]


def parameters_named_by(pattern: str, model: nn.Module, key: str) -> list[str]:
    """Names of the parameters of a network that a pattern names.

    Args:
        pattern: As `named_by` takes it.
        model: The network; names are its own.
        key: The key of the configuration that has the pattern, for the message.

    Raises:
        ConfigError: for a pattern that matches none, with the near miss.
    """
    names = [name for name, _ in model.named_parameters()]
    found = named_by(pattern, names)
    if not found:
        parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
        # A network has hundreds of names: for what has a dot, or is near none of its parts.
        lists = ([*paths, *names],) if "." in pattern else (parts, [*paths, *names])
        choices = next((each for each in lists if _near(pattern, each)), parts)
        raise ConfigError(unknown(f"parameters in {key}", pattern, choices))
    return found


def _near(pattern: str, names: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(pattern.lower(), [name.lower() for name in names]))
