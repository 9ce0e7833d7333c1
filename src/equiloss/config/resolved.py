"""From what Hydra composes to what a run is given: resolved, typed, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from equiloss.config import CallbacksConfig, Config, TrainerConfig
from equiloss.config.checks import check_plain, require
from equiloss.config.documentation import help_text
from equiloss.config.metrics import MetricsConfig, mode_of, with_modes
from equiloss.config.network import usual_image_size
from equiloss.errors import ConfigError

# What only a person sees, and how jobs are launched: a completed run is the same run without it.
PRESENTATION = frozenset(
    {"profile", "progress_bar", "model_summary", "resume", "in_use", "tags", "sweep.parallel"}
)
# Keys that each stored configuration has, whatever its version.
MARKS = frozenset({"loss", "data", "model", "optimizer", "trainer", "parity", "task", "seed"})

# What may stand in the place of a value that is missing.
EXAMPLES = {
    "loss.target": " (such as loss.target=torch.nn:CrossEntropyLoss or my_module:my_loss)",
    "model.target": " (such as model.target=my_module:my_network)",
    "data.target": " (such as data.target=my_module:my_splits)",
    "data.root": " (the directory that holds the data)",
}


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration in its three forms: typed, plain, and as the text that is stored."""

    config: Config
    plain: dict[str, Any]
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of the plain form: equal for two runs exactly if every value is equal."""
        canonical = json.dumps(self.plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def resolve(composed: DictConfig) -> ResolvedConfig:
    """Turn a composed (or stored) configuration into its resolved, typed form.

    Raises:
        ConfigError: for a required value that is missing, a value that makes no sense, or an
            argument of Lightning's Trainer that has a key of its own here.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        named = (f"{key}{EXAMPLES.get(key, '')}" for key in missing)
        raise ConfigError(f"missing value: {', '.join(named)}")
    plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    own = plain.get("callbacks")
    if isinstance(own, dict) and isinstance(own.get("items"), dict):
        CallbacksConfig(own["items"])  # whose reasons come before those of their options
    try:
        check_plain(plain)
    except ConfigError as error:
        raise ConfigError(f"the configuration {error}, and could not be stored") from error
    for key in sorted(MARKS):
        # Without it the stored configuration would be no run's.
        require(key in plain, f"{key} cannot be removed: leave ~{key} out")
    _check_groups({**_schema(), "loss": {}}, plain)
    if extra := plain.get("metrics", {}).get("extra"):
        MetricsConfig(extra)
        plain["metrics"] = {"extra": with_modes(extra)}
    known = {entry.name for entry in fields(TrainerConfig)}
    trainer = dict(plain["trainer"])
    arguments = {key: trainer.pop(key) for key in list(trainer) if key not in known}
    arguments |= trainer.pop("arguments", {})
    typed = OmegaConf.merge(
        OmegaConf.structured(Config),
        cast(Any, {**plain, "trainer": {**trainer, "arguments": arguments}}),
    )
    config = OmegaConf.to_object(typed)
    assert isinstance(config, Config)
    _write_out_modes(plain)
    return ResolvedConfig(config, plain, OmegaConf.to_yaml(OmegaConf.create(plain)))


def _check_groups(schema: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a value in the place of a group of keys: OmegaConf checks no interpolation for it."""
    for key, value in given.items():
        inner = schema.get(key)
        if isinstance(inner, Mapping):
            require(
                isinstance(value, Mapping),
                f"{prefix}{key} is a group of keys, not a value; got {value}",
            )
            _check_groups(inner, value, f"{prefix}{key}.")


def from_stored(plain: Mapping[str, Any]) -> dict[str, Any] | None:
    """A stored configuration, completed with today's defaults; None if it is none of ours.

    So a key that a later version adds makes no old run another configuration.
    """
    loss = plain.get("loss")
    named = isinstance(loss, dict) and isinstance(loss.get("name"), str)
    return with_defaults(plain) if named and plain.keys() >= MARKS else None


def with_defaults(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration, completed with the defaults of today's schema.

    >>> with_defaults({"trainer": {"devices": 2}})["trainer"]["reduction"]
    'sum'
    """
    completed = _completed(_schema(), plain)
    _write_out_modes(completed)
    return completed


def _write_out_modes(plain: dict[str, Any]) -> None:
    """Store the mode that follows from a metric, as earlier versions did."""
    metrics = plain.get("metrics")
    extra = metrics.get("extra") if isinstance(metrics, Mapping) else None
    for group in plain.keys() & {"checkpoint", "early_stopping"}:
        if plain[group].get("mode") is None and "monitor" in plain[group]:
            mode = mode_of(str(plain[group]["monitor"]), extra)
            plain[group] = {**plain[group], "mode": mode}


@cache
def _schema() -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(Config)))


def _completed(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _completed(defaults[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    return {**defaults, **given, **nested}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its dotted key; a list is one value.

    >>> list(leaves({"data": {"name": "digits"}, "seed": 1}))
    [('data.name', 'digits'), ('seed', 1)]
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def short_hash(text: str) -> str:
    """Eight hexadecimal digits that tell texts apart, for the name of a directory.

    >>> short_hash("loss=softmax_nll,seed=1")
    '4285a3e0'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def sweep_name(choice: str | None, overrides: Sequence[str]) -> str:
    """Name of a sweep's directory: the same for the same command.

    Args:
        choice: Name of the file of conf/sweep that was chosen, if any.
        overrides: The overrides as typed.

    >>> sweep_name("losses", ["sweep=losses"])
    'losses'
    >>> sweep_name(None, ["seed=1,2", "progress_bar=false"]) == sweep_name(None, ["seed=1,2"])
    True
    """
    silent = {"sweep", *PRESENTATION}
    distinct = sorted(
        text for text in overrides if text.partition("=")[0].lstrip("+~") not in silent
    )
    name = choice or "sweep"
    return f"{name}-{short_hash(','.join(distinct))}" if distinct or choice is None else name


def register_schema() -> None:
    """Make `Config` the node `schema` that `conf/config.yaml` starts from."""
    ConfigStore.instance().store(name="schema", node=Config)


# When this module is imported, as the workers of a parallel launcher do: they compose their own
# job. The cache carries a sweep's name, made from the command, over to its jobs.
OmegaConf.register_new_resolver("help_text", help_text, replace=True)
OmegaConf.register_new_resolver("presentation_keys", lambda: sorted(PRESENTATION), replace=True)
OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)
OmegaConf.register_new_resolver("usual_image_size", usual_image_size, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True, use_cache=True)
