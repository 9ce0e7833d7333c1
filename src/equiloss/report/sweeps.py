"""Keys that a sweep varied, as Hydra recorded them, and those that differ all the same."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser


def swept_keys(multirun: Path) -> set[str]:
    """Keys and config groups with several values, in the command or in the sweeper's parameters.

    Raises:
        KeyError: if the file is not what Hydra writes; what reading it raises, likewise.
    """
    hydra = yaml.safe_load(multirun.read_text(encoding="utf-8"))["hydra"]
    params = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *hydra["overrides"]["task"]])
    # The command has the last word over the parameters.
    varied = {override.key_or_group: override.is_sweep_override() for override in overrides}
    return {key for key, several in varied.items() if several}


def opaque_groups(swept: Collection[str], known: Collection[str]) -> list[str]:
    """Swept groups that stand for no part of the configuration: their choices may set any key.

    Args:
        swept: Keys and groups that a sweep varied.
        known: Every key of its runs' configurations.

    >>> opaque_groups(["loss", "experiment"], ["loss.name", "seed"])
    ['experiment']
    """
    return sorted(group for group in swept if not any(_covers(group, key) for key in known))


def unswept(swept: Collection[str], differing: Collection[str]) -> list[str]:
    """Of the keys that differ between a sweep's runs, those that it did not vary.

    >>> unswept(["loss", "seed"], ["loss.name", "data.batch_size", "seed"])
    ['data.batch_size']
    """
    return [key for key in differing if not any(_covers(group, key) for group in swept)]


def _covers(group: str, key: str) -> bool:
    """Whether a key is a swept key or group itself, or a part of it."""
    return f"{key}.".startswith(f"{group.replace('/', '.')}.")
