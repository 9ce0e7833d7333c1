"""Callbacks of one's own: `callbacks.items.NAME={target: package.module:Class, …}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, callbacks

from equiloss.config import REFUSED_CALLBACKS
from equiloss.errors import ConfigError, first_line
from equiloss.imports import import_target

REFUSED = {getattr(callbacks, name): reason for name, reason in REFUSED_CALLBACKS.items()}


def build(items: Mapping[str, Any]) -> list[Callback]:
    """Make the callbacks of a configuration.

    Args:
        items: By a name of one's own, `target` (package.module:Class, code by design) and further
            keys, which are keyword arguments.

    Raises:
        ConfigError: naming what cannot be imported, made, or used.

    >>> (timer,) = build({"mine": {"target": "lightning.pytorch.callbacks:Timer"}})
    >>> type(timer).__name__
    'Timer'
    """
    return [_build(f"callbacks.items.{name}", item) for name, item in items.items()]


def _build(key: str, item: Any) -> Callback:
    if not isinstance(item, Mapping) or not isinstance(item.get("target"), str):
        raise ConfigError(f"{key} needs a target: {key}.target=package.module:Class")
    made = import_target(item["target"], f"{key}.target", ConfigError)
    options = {name: value for name, value in item.items() if name != "target"}
    try:
        callback = made(**options)
    except Exception as error:  # foreign code may fail in any way
        raise ConfigError(f"{key}: {item['target']} cannot be made: {first_line(error)}") from error
    if not isinstance(callback, Callback):
        raise ConfigError(f"{key}.target={item['target']} makes no callback of Lightning's")
    for kind, reason in REFUSED.items():
        if isinstance(callback, kind):
            raise ConfigError(f"{key}: {kind.__name__} is refused: {reason}")
    return callback
