"""`model.weights`: the weights that a fit starts from, fitted to the network of the run."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equiloss.config import ModelConfig
from equiloss.config.network import is_file
from equiloss.errors import CheckpointError
from equiloss.models import published, timm, weight_files
from equiloss.models.head import paths_of
from equiloss.models.published import Published

# Modules of torchvision's files that networks are built without here, as they give more logits.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# As torchvision does with files of an older version of its densely connected networks.
OLD_DENSE = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")
SHOWN = 3


class Fitted(NamedTuple):
    """What of a file goes into a network, and what does not."""

    taken: Mapping[str, Tensor]
    """Tensors under the network's names, of its shapes."""
    new: Sequence[str]
    """The network's tensors that stay as they are: those of a head of another size."""
    missing: Sequence[str]
    """The network's other tensors for which the file has none that fits."""
    unused: Sequence[str]
    """The file's tensors that are not taken, but for those of its head."""
    faults: Sequence[str]
    """What is wrong, tensor by tensor, in words."""
    summed: str | None
    """The stem, where the file's has three channels and the network's has one."""


def named(config: ModelConfig) -> Published | None:
    """The published weights that `model.weights` names; None for a file, or for none.

    Raises:
        ModelError: for an unknown network or unknown weights, with the near miss.
    """
    if config.weights is None or is_file(config.weights):
        return None
    return timm.published(config) if config.library == "timm" else published.of_torchvision(config)


def fetch(config: ModelConfig) -> None:
    """Have published weights in the library's cache, where `model.download` allows it.

    Raises:
        ModelError: as `named`.
        CheckpointError: if they are missing.
    """
    if chosen := named(config):
        chosen.file(download=config.download)


def give(model: nn.Module, config: ModelConfig, num_classes: int) -> str:
    """Load what `model.weights` names into a network.

    Args:
        model: Gets them, in the dtype that its parameters have.
        config: Names them; `weights_strict` says what becomes of other tensors.
        num_classes: K.

    Returns:
        What was loaded, in words.

    Raises:
        CheckpointError: if the file is missing or unusable, or does not fit the network.
        ModelError: as `named`.
    """
    assert config.weights is not None
    chosen = named(config)
    file = chosen.file(download=config.download) if chosen else Path(config.weights)
    if chosen and config.library == "timm":
        given = timm.state_dict(config, chosen.name, file)
    else:
        given = weight_files.read(file)
    fitted = fit(_renamed(given, config), model, paths_of(model, num_classes))
    where = f"{chosen.name} ({file})" if chosen else str(file)
    if fitted.faults and (config.weights_strict or not fitted.taken):
        way_out = "model.weights_strict=false loads the others"
        raise CheckpointError(refusal(fitted, f"model.weights={where}", config, way_out))
    loaded = OrderedDict(fitted.taken)
    # A module may read a file of another version in another way; one without any is of today's.
    versions = getattr(given, "_metadata", None) or getattr(model.state_dict(), "_metadata", {})
    loaded._metadata = versions  # type: ignore[attr-defined]
    model.load_state_dict(loaded, strict=False)
    return f"{len(loaded)} tensors from {where}{remarks(fitted)}"


def fit(given: Mapping[str, Tensor], model: nn.Module, heads: Iterable[str]) -> Fitted:
    """Compare the tensors of a file with those of a network.

    A head of another number of classes, and one that the file lacks, is left as it is. A stem of
    three channels becomes one of one channel by the sum over them. That is what a grey image shown
    as RGB is given where all channels have one mean and one deviation, and approximately elsewhere.

    Args:
        given: The file's tensors.
        model: The network, which is left as it is.
        heads: Paths of its modules that give the logits.
    """
    own, given = model.state_dict(), dict(given)
    stem = _stem(model)
    summed = None
    if stem in own and stem in given and _is_of_three(own[stem], given[stem]):
        dtype = torch.promote_types(given[stem].dtype, torch.float32)
        given[stem], summed = given[stem].sum(dim=1, keepdim=True, dtype=dtype), stem
    new: list[str] = []
    for path in heads:
        tensors = [name for name in own if name.startswith(f"{path}.")]
        if all(name not in given or _is_of_others(own[name], given[name]) for name in tensors):
            new += tensors
    # Files from before torch 0.4.1 have no such counts, which matter to no network of today.
    modules = dict(model.named_modules())
    counts = {f"{n}.num_batches_tracked" for n, m in modules.items() if isinstance(m, _BatchNorm)}
    missing, faults = [], []
    for name in own:
        fault = _fault(name, own[name], given.get(name))
        if name not in new and fault and not (name in counts and name not in given):
            missing.append(name)
            faults.append(fault)
    faults += [f"{name} is not in the network" for name in given if name not in own]
    taken = {
        name: tensor
        for name, tensor in given.items()
        if name in own and name not in new and name not in missing
    }
    unused = [name for name in given if name not in taken and name not in new]
    return Fitted(taken, new, missing, unused, faults, summed)


def _fault(name: str, own: Tensor, given: Tensor | None) -> str | None:
    """Why a tensor of a file cannot be taken, if it cannot."""
    if given is None:
        return f"{name} is not in the file"
    if own.shape != given.shape:
        return f"{name} is {list(given.shape)} in the file and {list(own.shape)} in the network"
    if own.is_floating_point() != given.is_floating_point():
        return f"{name} is {given.dtype} in the file and {own.dtype} in the network"
    return None if bool(torch.isfinite(given).all()) else f"{name} is not finite in the file"


def _is_of_others(own: Tensor, given: Tensor) -> bool:
    """Whether a head's tensor differs from another's in the number of classes, and in that only."""
    return own.dim() == given.dim() and own.shape[1:] == given.shape[1:] and len(own) != len(given)


def _is_of_three(own: Tensor, given: Tensor) -> bool:
    """Whether the weight of a stem is for three channels where the network's is for one."""
    one = (*given.shape[:1], 1, *given.shape[2:])
    return given.dim() == 4 and given.shape[1] == 3 and own.shape == one


def _stem(model: nn.Module) -> str:
    """Name of the weight of the first convolution; "" where there is none."""
    convolutions = (n for n, module in model.named_modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return "" if first is None else f"{first}.weight".removeprefix(".")


def _renamed(given: Mapping[str, Tensor], config: ModelConfig) -> Mapping[str, Tensor]:
    """A file of torchvision's with the names of today, and without auxiliary classifiers."""
    auxiliary = AUXILIARY.get(config.name, ())
    dense = config.name.startswith("densenet")
    if config.library != "torchvision" or not (auxiliary or dense):
        return given
    renamed = OrderedDict(
        (OLD_DENSE.sub(r"\1\2", name) if dense else name, tensor)
        for name, tensor in given.items()
        if config.options.get("aux_logits") or not name.startswith(auxiliary or ("\0",))
    )
    renamed._metadata = getattr(given, "_metadata", None)  # type: ignore[attr-defined]
    return renamed


def refusal(fitted: Fitted, source: str, config: ModelConfig, way_out: str = "") -> str:
    """Why a source, such as `init_from=a.ckpt`, is refused; a way out if something fits."""
    if not fitted.taken:
        way_out = "none fits, so that it is another network's"
    said = f"{source} does not fit model {config.name!r}: left out would be "
    return said + _left_out(fitted) + (f"; {way_out}" if way_out else "")


def remarks(fitted: Fitted) -> str:
    """What a user should know of what was loaded, as the end of a sentence."""
    said = f"; the head is new ({', '.join(fitted.new)})" if fitted.new else ""
    if fitted.summed:
        said += (
            f"; {fitted.summed} is summed over 3 channels, approximately as if grey images were "
            "shown as RGB (data.options.channels=3 shows pictures in files so)"
        )
    return said + (f"; left out: {_left_out(fitted)}" if fitted.faults else "")


def _left_out(fitted: Fitted) -> str:
    first = "; ".join(fitted.faults[:SHOWN]) + "; …" * (len(fitted.faults) > SHOWN)
    network, file = len(fitted.missing), len(fitted.unused)
    return f"{network} of the network's tensors, and {file} of the file's ({first})"
