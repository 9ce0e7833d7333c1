"""Runs from Python, in a notebook or a script: compose, fit, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from equiloss.config.resolved import ResolvedConfig, register_schema, resolve
from equiloss.distributed import interruption
from equiloss.errors import ConfigError
from equiloss.launching.attempt import attempt
from equiloss.launching.composition_errors import check_words, explain, of_composition
from equiloss.launching.precision import settled
from equiloss.launching.pretrained import following_weights
from equiloss.launching.project import RUN, config_dir
from equiloss.launching.resume import claim
from equiloss.launching.stored_run import of_run, user_paths
from equiloss.losses import config_source
from equiloss.records.results import Result, read_columns


@dataclass(frozen=True)
class Fitted:
    """A run that is done; `equiloss.load` takes it for its directory."""

    directory: Path
    """The run directory, as `python train.py` leaves it."""
    result: Result
    """Everything that `results.json` holds."""

    def __fspath__(self) -> str:
        return os.fspath(self.directory)

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The final value of each metric by its logged name; losses in nats, rates in [0, 1]."""
        return self.result.metrics

    @property
    def curves(self) -> dict[str, tuple[Any, Any]]:
        """Steps [n] int64 and values [n] float64 of each metric that was logged, by its name."""
        return {
            name: (np.array(steps, dtype=np.int64), np.array(values))
            for name, (steps, values) in read_columns(self.directory).items()
        }


def compose(*overrides: str) -> ResolvedConfig:
    """Compose a configuration, as `equiloss train OVERRIDES` does it.

    Files of ./conf come before the shipped ones, and `task=test run=DIR` is a run's own
    configuration.

    Args:
        overrides: As on the command line, `loss=focal` or `trainer.max_epochs=5`.

    Raises:
        ConfigError: naming the override, the rule and the choices.
        RecordError: if the configuration of `run=DIR` cannot be read.

    >>> compose("model=mlp", "seed=3").config.seed
    3
    """
    register_schema()
    config_source.install()
    try:
        check_words(list(overrides))
        with initialize_config_dir(config_dir(), version_base="1.3"):
            composed = hydra_compose("config", overrides=list(overrides))
        user_paths(composed)
        return resolve(of_run(composed, overrides))
    except Exception as error:
        if not of_composition(error):
            raise
        raise ConfigError(explain(error)) from error


def fit(config: ResolvedConfig, directory: str | os.PathLike[str] | None = None) -> Fitted:
    """Run a configuration to its end, or go on with the run that a directory holds.

    One device runs in this process; several are processes of their own, which is why a notebook
    can have them.

    Args:
        config: Of `compose`.
        directory: The run directory (None: one named by the time, below `runs/`).

    Raises:
        UserError: for everything that a user can mend.
        Interrupted: if Ctrl-C or another signal asked for it, with the state on disk.
    """
    place = Path(f"runs/{config.config.task}/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    place = place if directory is None else Path(directory)
    config = settled(following_weights(config), place)
    with interruption.listening(), claim(place, config) as todo:
        if todo:
            attempt(config, place, RUN, again=f"fit(config, {str(place)!r})")
    return Fitted(place, Result.read(place))
