"""What of a network does not learn: `model.freeze`, and `model.unfreeze_after_epochs`.

Batch normalisation that is frozen evaluates while the rest trains: with the statistics that it
has, a row's logits depend on no other row, so that a step is the same however its batch is split.
It stays so for the whole run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from equiloss.config import ModelConfig
from equiloss.errors import ConfigError, ModelError
from equiloss.models.head import paths_of
from equiloss.models.patterns import parameters_named_by

# What is made of blocks, and is none itself. Their subclasses are: a convolution with its
# normalisation, say.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Parts that a line lists.
LISTED = 8


@dataclass(frozen=True)
class Frozen:
    """What of a network does not learn from the first step on."""

    parameters: tuple[str, ...]
    """Their names."""
    evaluating: tuple[str, ...]
    """Paths of the batch normalisation that stays in evaluation mode."""
    later: tuple[str, ...]
    """Parameters that learn after some epochs: all but those of that batch normalisation."""


def of(model: nn.Module) -> Frozen | None:
    """What of a network is frozen from the first step on, if anything is."""
    return model.frozen_parts if isinstance(model, _Frozen) else None


def freeze(config: ModelConfig, model: nn.Module, num_classes: int) -> None:
    """Freeze what a configuration names, in place; parameters, buffers and names stay.

    Args:
        config: `freeze` and `unfreeze_after_epochs`.
        model: The network.
        num_classes: K, by which its head is known.

    Raises:
        ConfigError: for a pattern that matches nothing, or where nothing would learn, or nothing
            would unfreeze.
        ModelError: for a network whose head, or whose sizes, are not known.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    >>> freeze(ModelConfig(name="mlp", freeze="backbone"), network, num_classes=2)
    >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    ['2.weight', '2.bias']
    >>> [module.training for module in network.train()]
    [True, False, True]
    """
    if config.freeze is None:
        return
    parameters = dict(model.named_parameters())
    if any(isinstance(each, UninitializedParameter) for each in parameters.values()):
        raise ModelError(
            f"model.freeze: model {config.name!r} has lazy layers, whose sizes are not known yet: "
            "give them their sizes"
        )
    names = _named(config, model, num_classes)
    if not names:
        raise ConfigError(
            f"model.freeze={_shown(config.freeze)} freezes nothing of model {config.name!r}, whose "
            f"blocks are {_listed(blocks(model))}"
        )
    if len(names) == len(parameters):
        raise ConfigError(
            f"model.freeze={_shown(config.freeze)} freezes all {len(names)} parameters of model "
            f"{config.name!r}: nothing would learn; leave out what is to learn"
        )
    evaluating = tuple(_evaluating(model, names))
    stays = {f"{path}.{name}" for path in evaluating for name in _own(model.get_submodule(path))}
    later = tuple(name for name in names if name not in stays)
    if config.unfreeze_after_epochs is None:
        later = ()
    elif not later:
        raise ConfigError(
            f"model.unfreeze_after_epochs={config.unfreeze_after_epochs} unfreezes nothing: "
            f"model.freeze={_shown(config.freeze)} names batch normalisation alone, which stays "
            "as it is"
        )
    for name in names:
        parameters[name].requires_grad_(False)
    kind = type(model)
    # By its class, and by paths: layers may be replaced, as torch's conversion to SyncBatchNorm
    # does, and copies are frozen too.
    model.__class__ = type(kind.__name__, (_Frozen, kind), {"__module__": kind.__module__})
    parts = Frozen(tuple(names), evaluating, later)
    object.__setattr__(model, "frozen_parts", parts)
    model.train(model.training)


def unfreeze(model: nn.Module) -> bool:
    """Have everything learn but the batch normalisation that was frozen.

    Returns:
        Whether that changed anything.
    """
    parts = of(model)
    if parts is None:
        return False
    parameters = [model.get_parameter(name) for name in parts.later]
    changed = any(not parameter.requires_grad for parameter in parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return changed


def will_learn(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that do not learn yet, and will."""
    parts = of(model)
    return set() if parts is None else {model.get_parameter(name) for name in parts.later}


def described(config: ModelConfig, model: nn.Module) -> str:
    """One line on what of a network learns now.

    >>> network, config = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ModelConfig(name="mlp")
    >>> config.freeze = ["0"]
    >>> freeze(config, network, num_classes=2)
    >>> described(config, network)
    'model.freeze=[0]: 8 of 23 parameters learn (1)'
    """
    parts, numbers = of(model), {name: each.numel() for name, each in model.named_parameters()}
    assert parts is not None
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    unfrozen = bool(parts.later) and learning.issuperset(parts.later)
    where = "all but frozen batch normalisation"
    if not (unfrozen and parts.evaluating):
        where = _listed(list(_parts(model, learning)))
    line = (
        f"model.freeze={_shown(config.freeze)}: {sum(numbers[name] for name in learning):,} of "
        f"{sum(numbers.values()):,} parameters learn ({where})"
    )
    if parts.later and not unfrozen:
        line += f", the others after {_counted(config.unfreeze_after_epochs or 0, 'epoch')}"
    if parts.evaluating:
        layers = _counted(len(parts.evaluating), "layer")
        line += f"; frozen batch normalisation ({layers}) evaluates, for the whole run"
    return line


def blocks(model: nn.Module) -> list[str]:
    """What a network is made of, in the order of registration: paths of modules, or parameters.

    A block holds parameters. Containers of torch.nn are opened, and so is a module with more than
    half of the network's numbers: that is its body, and no block of it. What it holds beside its
    modules comes before them, each parameter by itself.

    >>> stem, layers = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    >>> blocks(nn.Sequential(stem, layers, nn.Linear(4, 2)))
    ['0', '1.0', '1.2', '2']
    """
    half = sum(each.numel() for each in model.parameters()) / 2

    def within(module: nn.Module, prefix: str) -> Iterator[str]:
        yield from (prefix + name for name in _own(module))
        for name, child in module.named_children():
            size = sum(each.numel() for each in child.parameters())
            opened = type(child) in CONTAINERS or (size > half and any(child.children()))
            if size and opened:
                yield from within(child, f"{prefix}{name}.")
            elif size:
                yield prefix + name

    return list(within(model, ""))


class _Frozen(nn.Module):
    """Makes a network keep its frozen batch normalisation in evaluation mode."""

    frozen_parts: Frozen

    def train(self, mode: bool = True) -> _Frozen:
        """As torch's, but for what is frozen."""
        super().train(mode)
        for path in self.frozen_parts.evaluating:
            self.get_submodule(path).training = False
        return self


def _named(config: ModelConfig, model: nn.Module, num_classes: int) -> list[str]:
    """Names of the parameters that are to be frozen, in the network's order."""
    names = [name for name, _ in model.named_parameters()]
    if config.freeze == "backbone":
        heads = paths_of(model, num_classes)
        if not heads:
            raise ModelError(
                f"model.freeze=backbone: model {config.name!r} has no layer of {num_classes} "
                "outputs, which would be its head: name what is frozen, as model.freeze=[layer1]"
            )
        return [name for name in names if name.rpartition(".")[0] not in heads]
    if config.learning_blocks is not None:
        last = blocks(model)[-config.learning_blocks :]
        return [name for name in names if not any(_is_within(name, path) for path in last)]
    patterns = map(str, config.freeze)
    named = {n for each in patterns for n in parameters_named_by(each, model, "model.freeze")}
    return [name for name in names if name in named]


def _evaluating(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Paths of frozen modules with running statistics.

    One without parameters goes with those before it, or, where it is the first, after it.
    """
    frozen = set(names)
    order: list[tuple[str, bool | None]] = []
    for path, module in model.named_modules():
        own = [f"{path}.{name}" if path else name for name in _own(module)]
        order.append((path, frozen.issuperset(own) if own else None))
    first = next((state for _, state in order if state is not None), False)
    before = first
    for (path, state), module in zip(order, model.modules(), strict=True):
        before = before if state is None else state
        if before and any(name.startswith("running_") for name in _buffers(module)):
            yield path


def _parts(model: nn.Module, names: Collection[str], prefix: str = "") -> Iterator[str]:
    """The largest parts of a network that some parameters make up: modules, or parameters."""
    yield from (prefix + name for name in _own(model) if prefix + name in names)
    for name, child in model.named_children():
        path = prefix + name
        inside = [f"{path}.{each}" for each, _ in child.named_parameters()]
        if inside and all(each in names for each in inside):
            yield path
        else:
            yield from _parts(child, names, f"{path}.")


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _buffers(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False)]


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"


def _shown(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return f"[{','.join(map(str, value))}]"
    return str(value)
