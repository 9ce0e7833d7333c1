"""Networks of timm by name, and the weights that it publishes for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equiloss.config import ModelConfig
from equiloss.errors import CheckpointError, ModelError, first_line, unknown
from equiloss.models.published import Published, check_name, file_name, place_of

EXTRA = "pip install 'equiloss[timm]'"
# What a repository of Hugging Face's holds, the better first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def network(name: str, num_classes: int, channels: int, /, **options: Any) -> nn.Module:
    """A network of timm with random weights: images [N, C, H, W] -> logits [N, K].

    Args:
        name: As `timm.list_models()` has it, with or without the tag of published weights.
        num_classes: K.
        channels: C.
        options: Keyword arguments of `timm.create_model`.

    Raises:
        ModelError: if timm is not installed, or has no such network.
    """
    _check(name)
    import timm.layers

    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=channels, **options
    )
    layers: Any = timm.layers
    for module in model.modules():
        if type(module) is layers.BatchNormAct2d:
            module.__class__ = BatchNormAct2d
    return model


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's batch normalisation with an activation after it, which is a copy of torch's code.

    Here it calls torch's, which can so be replaced by what goes over all ranks.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        """[n, C, H, W] -> [n, C, H, W]."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def published(config: ModelConfig) -> Published:
    """What `model.weights` names: DEFAULT, or the tag of one of timm's pretrained configurations.

    Raises:
        ModelError: for an unknown network, or weights that it does not have, with the near miss.
    """
    _check(config.name)
    from timm.models import get_pretrained_cfg, list_pretrained

    name, _, tag = config.name.partition(".")
    tags = [each.partition(".")[2] for each in list_pretrained(f"{name}.*")]
    check_name(config, tags)
    chosen = tag or None if config.weights == "DEFAULT" else config.weights
    pretrained = get_pretrained_cfg(f"{name}.{chosen}" if chosen else name)
    assert pretrained is not None
    url, place = _source(pretrained, f"{name}.{pretrained.tag}")
    return Published(
        name=str(pretrained.tag),
        url=url,
        place=place,
        mean=tuple(pretrained.mean),
        std=tuple(pretrained.std),
        image_size=int(pretrained.input_size[-1]),
        options={},
        cached=_cached(pretrained),
    )


def state_dict(config: ModelConfig, weights: str, file: Path) -> Mapping[str, Tensor]:
    """The tensors of a published file, under the names that the network has now.

    timm itself reads them into a network of the published number of classes and channels: many
    files have names of another code, and position embeddings of another image size.

    Args:
        config: The network and its options.
        weights: Tag of the published weights.
        file: Theirs.

    Raises:
        CheckpointError: if they do not go with the network.
    """
    from timm.models import create_model, get_pretrained_cfg

    chosen = f"{config.name.partition('.')[0]}.{weights}"
    pretrained = get_pretrained_cfg(chosen)
    assert pretrained is not None
    overlay = {"file": str(file), "custom_load": file.suffix == ".npz"}
    try:
        model: nn.Module = create_model(
            chosen,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=pretrained.num_classes,
            in_chans=pretrained.input_size[0],
            **dict(config.options),
        )
    except Exception as error:  # whatever a file makes it raise
        raise CheckpointError(
            f"{file}, of model.weights={weights}, cannot be used: {first_line(error)}"
        ) from error
    return model.state_dict()


def _check(name: str) -> None:
    """Refuse what timm does not have; a name that would be looked up in a hub is none of its own.

    Raises:
        ModelError: if there is no timm, or no such network in it.
    """
    try:
        from timm import list_models
        from timm.models import is_model
    except ImportError as error:
        raise ModelError(f"model=timm needs timm, which is not installed: {EXTRA}") from error
    if ":" in name or "/" in name or not is_model(name.partition(".")[0]):
        raise ModelError(unknown("model of timm", name, list_models()))


def _source(pretrained: Any, name: str) -> tuple[str, Path]:
    """Where a file is published, and its place in torch's cache."""
    if pretrained.hf_hub_id:
        file = pretrained.hf_hub_filename or HUB_FILES[0]
        url = f"https://huggingface.co/{pretrained.hf_hub_id}/resolve/main/{file}"
        return url, place_of(f"{name}{Path(file).suffix}")
    return pretrained.url, place_of(file_name(pretrained.url))


def _cached(pretrained: Any) -> Path | None:
    """The file in the cache of huggingface_hub, or in torch's under the name that it had before."""
    if pretrained.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = pretrained.hf_hub_id.partition("@")
        own = pretrained.hf_hub_filename
        for file in (own,) if own else HUB_FILES:
            found = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    before = place_of(file_name(pretrained.url)) if pretrained.url else None
    return before if before is not None and before.is_file() else None
