"""Weights that a library publishes for its networks: what goes with them, and where they lie."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from equiloss.config import ModelConfig
from equiloss.config.network import OWN
from equiloss.errors import CheckpointError, ModelError, first_line, unknown

log = logging.getLogger(__name__)

# What a published file's name says of its content: the first digits of its SHA-256.
DIGEST = re.compile(r"-([0-9a-f]{8,})\.\w+$")


class Published(NamedTuple):
    """Published weights of a network, and what the network was given when it was trained."""

    name: str
    """Of the weights, such as IMAGENET1K_V1."""
    url: str
    """Of the file."""
    place: Path
    """Where the file is looked for, and put."""
    mean: tuple[float, ...]
    """Per channel of pixel values in [0, 1]."""
    std: tuple[float, ...]
    """Likewise."""
    image_size: int
    """Height and width in pixels."""
    options: dict[str, Any]
    """Of the network, where the weights need other ones than its defaults."""
    cached: Path | None = None
    """The file in another cache of the library's, if it is there."""

    def file(self, *, download: bool) -> Path:
        """Where the file is; it is fetched if it is missing and that is wanted.

        Raises:
            CheckpointError: if it is missing, saying where it would come from and go to, or if
                it cannot be had.
        """
        file = self.cached or self.place
        if not file.is_file():
            if not download:
                raise CheckpointError(
                    f"model.weights={self.name} is not here: put {self.url} at {self.place}, or "
                    "have it fetched by model.download=true"
                )
            _fetch(self)
        _compare(file)
        return file


def place_of(name: str) -> Path:
    """Where torch keeps a file of published weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def torchvision_models(name: str) -> Any:
    """The module `torchvision.models`, after a look whether it has a classifier of that name.

    Raises:
        ModelError: if it has none, with the near miss.
    """
    # Imported here: torchvision is slow to import, and the small networks do without it.
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        other = f"; timm has it: model=timm model.name={name}" * _is_of_timm(name)
        raise ModelError(unknown("model", name, [*OWN, *known]) + other)
    return models


def _is_of_timm(name: str) -> bool:
    try:
        from timm.models import is_model
    except ImportError:
        return False
    return bool(is_model(name))


def of_torchvision(config: ModelConfig) -> Published:
    """What `model.weights` names for a network of torchvision.

    Raises:
        ModelError: for an unknown network, or weights that it does not have, with the near miss.
    """
    weights = torchvision_models(config.name).get_model_weights(config.name)
    check_name(config, [each.name for each in weights])
    chosen = weights.DEFAULT if config.weights == "DEFAULT" else weights[str(config.weights)]
    shown = chosen.transforms()
    # What torchvision's own functions set for such weights.
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        options["transform_input"] = True
    if config.name.startswith("vit_"):
        options["image_size"] = chosen.meta["min_size"][0]
    return Published(
        name=chosen.name,
        url=chosen.url,
        place=place_of(file_name(chosen.url)),
        mean=tuple(shown.mean),
        std=tuple(shown.std),
        image_size=int(shown.crop_size[0]),
        options=options,
    )


def check_name(config: ModelConfig, known: Iterable[str]) -> None:
    """Refuse weights that a network does not have.

    Raises:
        ModelError: with the near miss and the choices.
    """
    names = list(known)
    if not names:
        raise ModelError(
            f"{config.library} publishes no weights for {config.name}: name a file, or leave "
            f"model.weights={config.weights} out"
        )
    if config.weights not in ("DEFAULT", *names):
        said = unknown(f"model.weights of {config.name}", str(config.weights), ["DEFAULT", *names])
        raise ModelError(f"{said}; or a file that ends in .pth, .pt or .safetensors")


def file_name(url: str) -> str:
    """Name of the file that a URL leads to.

    >>> file_name("https://download.pytorch.org/models/resnet18-f37072fd.pth")
    'resnet18-f37072fd.pth'
    """
    return os.path.basename(urlparse(url).path)  # noqa: PTH119  # of a URL


def _fetch(published: Published) -> None:
    """Put a published file at its place; a part of one never lies there.

    Raises:
        CheckpointError: if it cannot be had.
    """
    digest = DIGEST.search(file_name(published.url))
    log.info("fetching %s", published.url)
    try:
        published.place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            published.url, str(published.place), digest and digest[1], progress=False
        )
    except Exception as error:  # the network, the disk, and what came
        reason = getattr(error, "reason", error)  # urllib's errors wrap the system's
        why = getattr(reason, "strerror", None) or first_line(error)
        said = f"could not be fetched ({why}); put it at {published.place}"
        if why.startswith("invalid hash"):
            said = "gave a file that has not the SHA-256 of its name; it was thrown away"
        raise CheckpointError(f"model.weights={published.name}: {published.url} {said}") from error


def _compare(file: Path) -> None:
    """Say where a file is not the one that was published under its name."""
    digest = DIGEST.search(file.name)
    if digest is None:
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(digest[1]):
        log.warning(
            "%s is not the published file: its SHA-256 begins with %s, and not as its name says",
            *(file, found[: len(digest[1])]),
        )
