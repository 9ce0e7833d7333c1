"""What a sweep varied, as Hydra wrote it down."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

MULTIRUN = "multirun.yaml"


def sweep_of(place: Path) -> Path | None:
    """The nearest directory above a run's that Hydra swept into, if any."""
    return next((above for above in place.parents if (above / MULTIRUN).is_file()), None)


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


def opaque(swept: Iterable[str], known: Iterable[str]) -> list[str]:
    """Swept groups that stand for no part of the configuration: their choices may set any key.

    Args:
        swept: Keys and groups that a sweep varied.
        known: Every key of its runs' configurations.

    >>> opaque(["loss", "experiment"], ["loss.name", "seed"])
    ['experiment']
    """
    known = list(known)
    return sorted(asked for asked in swept if not any(_covers(asked, key) for key in known))


def unasked(swept: Iterable[str], differing: Iterable[str]) -> list[str]:
    """Of the keys that differ between a sweep's runs, those that it did not vary.

    >>> unasked(["loss", "seed"], ["loss.name", "data.batch_size", "seed"])
    ['data.batch_size']
    """
    swept = list(swept)
    return [key for key in differing if not any(_covers(asked, key) for asked in swept)]


def _covers(asked: str, key: str) -> bool:
    """Whether a key is what was asked for, or a part of it."""
    return f"{key}.".startswith(f"{asked.replace('/', '.')}.")
