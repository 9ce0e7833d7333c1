"""What the groups of the configuration check their values with."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig

from equiloss.errors import ConfigError


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


def open_dict() -> Any:
    """An empty node that takes any key, where Hydra would want known ones."""
    return DictConfig({}, flags={"struct": False})
