"""Normalisation and size that follow from published weights, stored with a run's configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from equiloss.config import DataConfig
from equiloss.config.network import is_file
from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.distributed import membership

# Sets of pictures in files, which are read one by one. Of a set that lives in memory the images
# stay as they are: at 224 pixels CIFAR-10 would take 9 GB.
FROM_FILES = ("image_folder", "table")
# Sets of one channel, where the set has no option for it; `synthetic` has one unless it is told.
GREY = ("digits", "mnist", "fashion_mnist", "synthetic")


def following_weights(resolved: ResolvedConfig) -> ResolvedConfig:
    """A configuration with what published weights expect in the place of null.

    `model.weights=DEFAULT` becomes their name; `data.mean`, `data.std` and, for pictures in files,
    `data.image_size` become those that they were trained with, and options of the network that
    they need are set, each unless it is set already. Grey images get the mean over the channels
    (approximately what they are given as RGB). The first rank says so. The file of the weights is
    not needed.

    Raises:
        ModelError: for an unknown network or unknown weights, with the near miss.
    """
    config = resolved.config
    if config.model.weights is None or is_file(config.model.weights):
        return resolved
    # Imported here: it takes torch and the library along, and most runs start without.
    from equiloss.models import weights

    chosen = weights.named(config.model)
    assert chosen is not None
    data: dict[str, Any] = {}
    for key, values in (("mean", chosen.mean), ("std", chosen.std)):
        if getattr(config.data, key) is None:
            grey = _channels(config.data) == 1
            data[key] = [round(sum(values) / len(values), 6)] if grey else list(values)
    if config.data.image_size is None and config.data.name in FROM_FILES:
        data["image_size"] = chosen.image_size
    plain = resolved.plain
    options = {**chosen.options, **plain["model"]["options"]}
    model = {**plain["model"], "weights": chosen.name, "options": options}
    changed = {**plain, "data": {**plain["data"], **data}, "model": model}
    if changed == plain:
        return resolved
    if membership.is_first():
        said = [f"data.{key}={value}" for key, value in data.items()]
        added = options.keys() - plain["model"]["options"].keys()
        said += [f"model.options.{key}={options[key]}" for key in sorted(added)]
        words = " ".join([chosen.name, *said])
        print(f"model.weights={config.model.weights}: {words}", flush=True)
    return resolve(OmegaConf.create(changed))


def _channels(config: DataConfig) -> Any:
    """Channels of the images; 3 for data of the user's own, which say so where they have others."""
    return config.options.get("channels", 1 if config.name in GREY else 3)
