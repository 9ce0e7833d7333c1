"""Keys that a sweep varied, as Hydra recorded them, and those that differ all the same."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from equiloss.errors import RecordError
from equiloss.records.reading import fits, read_yaml

# The parser of overrides needs a second for some ten thousand letters.
MOST_LETTERS = 50_000
NOTED = {"hydra": {"overrides": {"task": list[str]}, "sweeper": dict[str, Any]}}


def swept_keys(multirun: Path) -> set[str]:
    """Keys and config groups with several values, in the command or in the sweeper's parameters.

    Raises:
        RecordError: if the file is not what Hydra writes.
    """
    tree = read_yaml(multirun)
    params = (tree["hydra"]["sweeper"].get("params") or {}) if fits(tree, NOTED) else None
    if not isinstance(params, dict):
        raise RecordError(multirun, "is not what Hydra notes of a sweep")
    texts = [f"{key}={value}" for key, value in params.items()]
    texts += tree["hydra"]["overrides"]["task"]
    if sum(map(len, texts)) > MOST_LETTERS:
        raise RecordError(multirun, f"has overrides of more than {MOST_LETTERS} characters")
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except (HydraException, RecursionError) as error:
        raise RecordError(multirun, "has overrides that Hydra cannot read") from error
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
