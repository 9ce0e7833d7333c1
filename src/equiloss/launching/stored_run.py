"""Paths on the command line; `task=test run=DIR`, an evaluation by a run's own configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_original_cwd, to_absolute_path
from omegaconf import DictConfig, OmegaConf

from equiloss.config.network import is_file
from equiloss.config.resolved import PRESENTATION, from_stored, leaves
from equiloss.errors import ConfigError
from equiloss.launching.resume import is_completed
from equiloss.records.reading import read_yaml
from equiloss.records.run_dir import BEST, CHECKPOINTS, CONFIG, TESTED

log = logging.getLogger(__name__)

# What a stranger's run does not decide: where is logged, what is fetched, what is shown.
OF_THE_COMMAND = {"logger", "data.download", "model.download", *PRESENTATION}


def user_paths(composed: DictConfig) -> None:
    """Have paths count from where the user stood, and `~` be the user's own directory.

    A path that already does stays as it is written: it is part of what a run is known by.
    """
    for key in ("data.root", "data.table", "ckpt_path", "init_from", "model.weights"):
        path = OmegaConf.select(composed, key, throw_on_missing=False)
        if isinstance(path, str) and (key != "model.weights" or is_file(path)):
            path = os.path.expanduser(path)  # noqa: PTH111  # which would write it anew
            # From Python no application of Hydra's has moved.
            moved = HydraConfig.initialized() and Path.cwd() != Path(get_original_cwd())
            OmegaConf.update(composed, key, to_absolute_path(path) if moved else path)


def of_run(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run that `run` names, with what the command changes in it.

    Args:
        composed: What Hydra composed; returned as it is where it names no run.
        overrides: The command's own overrides, `key=value`.

    Raises:
        ConfigError: if the directory is no run's, the task is to train, an override names neither
            a key nor a group, or the run's configuration names code that the command does not:
            a stranger's directory is data.
        RecordError: if the run's configuration cannot be read.
    """
    name = composed.get("run")
    if name is None:
        return composed
    if composed.task == "fit":
        raise ConfigError(f"run={name} is evaluated, by task=test or task=validate")
    directory = Path(to_absolute_path(os.path.expanduser(str(name))))  # noqa: PTH111
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"run={name}: {directory} is no run's directory, which has a {CONFIG}")
    if not is_completed(directory):
        log.warning("run=%s has not completed: its weights so far are evaluated", name)
    stored = from_stored(read_yaml(directory / CONFIG))
    if stored is None:
        raise ConfigError(f"run={name}: its {CONFIG} is no configuration of a run")
    own = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    given = {each.key_or_group for each in OverridesParser.create().parse_overrides([*overrides])}
    weights = TESTED.get(stored["test_weights"], BEST)
    config = OmegaConf.create(stored)
    OmegaConf.update(config, "ckpt_path", str(directory / CHECKPOINTS / weights))
    for key in sorted({*given, *OF_THE_COMMAND}):
        dotted = key.replace("/", ".")
        if dotted not in dict(leaves(own)) and not isinstance(_at(own, dotted), dict):
            raise ConfigError(f"{key} goes not with run=…: set keys, or groups such as trainer=")
        OmegaConf.update(config, dotted, _at(own, dotted), merge=False, force_add=True)
    for key, value in leaves(cast(dict[str, Any], OmegaConf.to_container(config))):
        if key.rpartition(".")[2] in ("target", "_target_") and value not in (None, _at(own, key)):
            raise ConfigError(f"run={name} names code to run: if you trust it, add {key}={value}")
    config.run = None
    return config


def _at(tree: Any, dotted: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
