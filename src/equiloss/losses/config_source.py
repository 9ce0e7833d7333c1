"""Registered losses as Hydra config nodes: `loss=NAME loss.OPTION=VALUE` without a YAML file.

A `ConfigSource` of its own scheme answers Hydra's questions about the group `loss` from the
registry: listing uses names alone, loading imports the one chosen loss and makes its node from
the signature. (A ConfigStore would have to import every plugin beforehand.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from equiloss.config import open_dict
from equiloss.config.shipped import CONF
from equiloss.errors import LossError
from equiloss.losses import registry
from equiloss.losses.description import describe
from equiloss.losses.registry import CUSTOM
from equiloss.losses.signature import config_node

SCHEME = "equiloss-losses"


@dataclass
class CustomLoss:
    """A loss by import path."""

    name: str = CUSTOM
    target: str = MISSING
    """package.module:function"""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Keyword arguments of the loss."""


class LossConfigSource(ConfigSource):
    """Answers for `loss/<registered name>` and `loss/custom`."""

    @staticmethod
    def scheme() -> str:
        """The URL scheme that leads here."""
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """The node of one loss; imports that loss at most, and no other."""
        name = self._loss_name(config_path)
        if name is None or name not in _choices():
            raise ConfigLoadError(f"no loss config {config_path!r}")
        return ConfigResult(
            config=OmegaConf.structured(_node(name)),
            path=f"{SCHEME}://",
            provider=self.provider,
            header={"package": None},
        )

    def available(self) -> bool:
        """Always: the built-in losses are there."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether the path is the group of losses, or the root above it."""
        return config_path in ("", "loss")

    def is_config(self, config_path: str) -> bool:
        """Whether the path is a registered loss."""
        return self._loss_name(config_path) in _choices()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names below the path, without importing a loss."""
        if config_path == "" and results_filter in (None, ObjectType.GROUP):
            return ["loss"]
        if config_path == "loss" and results_filter in (None, ObjectType.CONFIG):
            return _choices()
        return []

    @staticmethod
    def _loss_name(config_path: str) -> str | None:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        return name if group == "loss" and name else None


class LossSearchPath(SearchPathPlugin):
    """Puts the registered losses on Hydra's search path, and refuses YAML files that hide one."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source of losses.

        Raises:
            LossError: if a YAML file in conf/loss/ has the name of a registered loss. Hydra would
                take the file, without types, in silence.
        """
        for element in search_path.get_path():
            url = urlparse(element.path)
            if url.scheme not in ("", "file"):
                continue
            for name in _choices():
                file = Path(url.path) / "loss" / f"{name}.yaml"
                if file.is_file():
                    source = "equiloss" if name == CUSTOM else registry.provider(name).source
                    raise LossError(
                        f"{file} would hide the loss {name!r} of {source}: give the file "
                        f"a name of its own, with `defaults: [{name}, _self_]` inside"
                    )
        search_path.append(provider="equiloss", path=f"{SCHEME}://")
        # Behind the files of a project on the installed package, which hide those of their names.
        shipped = CONF.resolve()
        primary = [urlparse(element.path).path for element in search_path.get_path()]
        if not any(path and Path(path).resolve() == shipped for path in primary):
            search_path.append(provider="equiloss", path=f"file://{CONF}")


def _choices() -> list[str]:
    return list(dict.fromkeys([*registry.names(), CUSTOM]))


def _node(name: str) -> Any:
    if name == CUSTOM:
        return CustomLoss()
    return config_node(name, describe(name).options)


def install() -> None:
    """Make registered losses known to Hydra; call it before the application composes."""
    # Hydra copies its sources for each question, and with them the store of all schemas, which
    # copies what it gives anyway: `--help` asks a hundred, and took three times as long.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    plugins = Plugins.instance()
    plugins.register(LossConfigSource)
    plugins.register(LossSearchPath)
