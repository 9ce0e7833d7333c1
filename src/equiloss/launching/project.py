"""`equiloss train`, which is `python train.py` anywhere, and `equiloss new`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from equiloss.config.resolved import register_schema
from equiloss.config.shipped import CONF, PROJECT
from equiloss.errors import ConfigError
from equiloss.launching import command
from equiloss.launching.launch import launch
from equiloss.losses import config_source

RUN = "equiloss.run:run"


def train(arguments: Sequence[str]) -> None:
    """Do what `python train.py ARGUMENTS` does, with the files of ./conf before the shipped ones.

    It ends the process, as `command.main` does.
    """
    register_schema()
    config_source.install()
    sys.argv = ["equiloss train", *arguments]

    @hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")
    def application(composed: DictConfig) -> float:
        return launch(composed, run=RUN)

    command.main(application)


def config_dir() -> str:
    """./conf of a project, whose files come before the shipped ones, or else these alone."""
    own = Path("conf").absolute()
    return str(own if own.is_dir() else CONF.resolve())


def new(directory: Path) -> list[Path]:
    """Copy the example project; returns its files.

    Raises:
        ConfigError: if something is there already, or it cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already: name a new or an empty directory")
    try:
        shutil.copytree(
            PROJECT, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    except OSError as error:
        # copytree goes on after an error, and lists them: from where, to where, why.
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise ConfigError(f"cannot write {directory}: {why}") from error
    return sorted(file for file in directory.rglob("*") if file.is_file())
