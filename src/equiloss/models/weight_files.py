"""Files of weights: tensors by their names, read without running anything that a file holds."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiloss.errors import CheckpointError, first_line

EXTRA = "pip install 'equiloss[safetensors]'"
# Where training scripts put the network's tensors among others.
NESTED = ("state_dict", "model", "model_state_dict")
# What torch says of a type that it does not make.
TYPE = re.compile(r"GLOBAL ([\w.]+)")
# What this project's own checkpoints have.
OWN_KEY = "equiloss"


def read(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name; a wrapper's prefix that all of them have is left out.

    Args:
        file: A state dict of `torch.save`, alone or under one of the keys state_dict, model and
            model_state_dict; or a file of safetensors.

    Returns:
        On the host. With the versions of the modules that wrote them as `_metadata`, as torch has
        it, where the file has them.

    Raises:
        CheckpointError: if there is no such file, it is damaged, holds code or no tensors, or is a
            checkpoint of equiloss.
    """
    if file.is_dir():
        raise CheckpointError(f"model.weights={file} is a directory: name a file in it")
    if not file.is_file():
        raise CheckpointError(f"model.weights={file}: there is no such file")
    loaded = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    if isinstance(loaded, Mapping) and OWN_KEY in loaded:
        raise CheckpointError(
            f"model.weights={file} is a checkpoint of equiloss: start from it by init_from={file}"
        )
    # What lies beside a state dict may be tensors too, such as the best accuracy.
    nested = [loaded.get(key) for key in NESTED] if isinstance(loaded, Mapping) else []
    found = next(filter(None, map(_tensors, [*nested, loaded])), None)
    if not found:
        raise CheckpointError(
            f"model.weights={file} holds no tensors by their names: save network.state_dict()"
        )
    while prefix := _wrapper(found):
        found = _without(prefix, found)
    return found


def _wrapper(found: Mapping[str, Tensor]) -> str | None:
    """The prefix that DistributedDataParallel or torch.compile has given to all names."""
    of_all = (p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in found))
    return next(of_all, None)


def _tensors(loaded: Any) -> OrderedDict[str, Tensor]:
    """The named tensors among what a file holds."""
    found: OrderedDict[str, Tensor] = OrderedDict()
    if isinstance(loaded, Mapping):
        for name, value in loaded.items():
            if isinstance(name, str) and isinstance(value, Tensor):
                found[name] = value
        if isinstance(versions := getattr(loaded, "_metadata", None), Mapping):
            found._metadata = versions  # type: ignore[attr-defined]
    return found


def _without(prefix: str, found: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    shorter = OrderedDict((name.removeprefix(prefix), value) for name, value in found.items())
    versions: Mapping[str, Any] = getattr(found, "_metadata", {})
    if versions:
        inner = {n.removeprefix(prefix): v for n, v in versions.items() if n.startswith(prefix)}
        shorter._metadata = {"": {}, **inner}  # type: ignore[attr-defined]
    return shorter


def _pickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read model.weights={file}: {error.strerror}") from error
    except Exception as error:  # torch raises many types for a file that is none of its own
        if kind := TYPE.search(str(error)):
            raise CheckpointError(
                f"model.weights={file} holds more than tensors ({kind[1]}), which could be code: "
                "nothing of it was run; save network.state_dict() alone"
            ) from error
        raise CheckpointError(
            f"model.weights={file} is damaged, or was not written by torch.save"
        ) from error


def _safetensors(file: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"model.weights={file} needs safetensors, which is not installed: {EXTRA}"
        ) from error
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"model.weights={file} is damaged, or no file of safetensors: {first_line(error)}"
        ) from error
