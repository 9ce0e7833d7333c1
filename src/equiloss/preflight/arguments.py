"""Arguments that go to Lightning's Trainer as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from lightning.pytorch import Trainer

from equiloss.errors import ConfigError, unknown


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
