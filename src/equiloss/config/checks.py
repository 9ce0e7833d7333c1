"""What the groups of the configuration check their values with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from equiloss.errors import ConfigError, brief

# Neither a person nor a run writes more of them, and reading has to end.
DEPTH = 32
# YAML's numbers to the base of 60 take a time that is quadratic in their length.
SCALAR = 20_000


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with a message unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def positive(key: str, value: float | None) -> None:
    """Raise `ConfigError` unless the value of a key is positive or null."""
    require(value is None or value > 0, f"{key} must be positive, got {value}")


def finite(key: str, *values: float | None, least: float = -math.inf) -> None:
    """Raise `ConfigError` unless the values of a key are finite and at least `least`, or null."""
    rule = "finite" if least == -math.inf else f"finite and at least {least:g}"
    for value in values:
        right = value is None or (math.isfinite(value) and value >= least)
        require(right, f"{key} must be {rule}, got {value}")


def check_plain(tree: Any, key: str = "", depth: int = 0) -> None:
    """Refuse what no file of a run holds: depth, keys that are no text, numbers beyond 64 bits.

    Raises:
        ConfigError: saying what is wrong and where, as the end of a sentence.

    >>> check_plain({"trainer": {"max_steps": 2**64}})
    Traceback (most recent call last):
    equiloss.errors.ConfigError: has an integer beyond 64 bits at trainer.max_steps
    """
    where = f" at {brief(key)}" if key else ""
    require(depth <= DEPTH, f"is nested deeper than {DEPTH} levels{where}")
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            require(isinstance(name, str), f"has the key {name!r}, which is no text{where}")
            check_plain(value, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            check_plain(value, key, depth + 1)
    elif isinstance(tree, int):
        require(tree.bit_length() <= 63, f"has an integer beyond 64 bits{where}")
    elif isinstance(tree, str):
        require(len(tree) <= SCALAR, f"has a value of more than {SCALAR} characters{where}")
        require(_is_unicode(tree), f"has a value that is no text in UTF-8{where}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_patterns(value: Any) -> bool:
    """Whether a value is a list of names, such as those of parameters: a layer may be called 0.

    >>> is_patterns(["layer1", 0]), is_patterns("layer1"), is_patterns([True])
    (True, False, False)
    """
    kinds = (str, int)
    return isinstance(value, list) and all(
        isinstance(each, kinds) and not isinstance(each, bool) and each != "" for each in value
    )


def open_dict() -> Any:
    """An empty node that takes any key, where Hydra would want known ones."""
    return DictConfig({}, flags={"struct": False})
