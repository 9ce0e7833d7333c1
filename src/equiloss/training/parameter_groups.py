"""Which parameter learns at which rate, and decays by how much: `optimizer.groups`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from equiloss.config import OptimizerConfig
from equiloss.errors import ConfigError
from equiloss.models import freezing
from equiloss.models.patterns import parameters_named_by


class Group(NamedTuple):
    """Parameters that learn alike."""

    name: str
    """Their patterns."""
    parameters: list[nn.Parameter]
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Of weights."""
    exempt_decay: float
    """Of norms and biases: parameters with fewer than two axes."""

    def __str__(self) -> str:
        number = sum(each.numel() for each in self.parameters)
        line = f"{self.name}: {number:,} parameters, lr {self.lr:g}, decay {self.weight_decay:g}"
        if self.exempt_decay != self.weight_decay:
            line += f" ({self.exempt_decay:g} of norms and biases)"
        return line


def grouped(config: OptimizerConfig, module: nn.Module, network: nn.Module) -> list[Group]:
    """The parameters that learn, or will when they are unfrozen, each in exactly one group.

    First come those that no pattern names, at the optimizer's own rate.

    Norms and biases are not decayed: decay pulls weights towards 0, and for a scale or an offset
    0 is no simpler than another value. A group with a decay of its own decays all that it names.

    Args:
        config: Rate, decay and groups; a parameter belongs to the first group that names it.
        module: Whose parameters are trained.
        network: The part of it that the patterns are for, with its own names.

    Raises:
        ConfigError: for a pattern that matches nothing, with the near miss, and for a group to
            which earlier ones, or what is frozen for the whole run, leave nothing.

    >>> config = OptimizerConfig(lr=0.5, groups=[{"pattern": "*.bias", "lr_factor": 2}])
    >>> network = nn.Linear(3, 2)
    >>> [str(group) for group in grouped(OptimizerConfig(lr=0.5), network, network)]
    ['the others: 8 parameters, lr 0.5, decay 0']
    """
    coming = freezing.will_learn(network)
    left = {p: None for p in module.parameters() if p.requires_grad or p in coming}
    names = dict(network.named_parameters())
    groups: list[Group] = []
    for number, group in enumerate(config.groups):
        key = f"optimizer.groups[{number}].pattern"
        own = [n for each in group.patterns for n in parameters_named_by(each, network, key)]
        found = {names[name] for name in own}
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        exempt = 0.0 if group.weight_decay is None else decay
        parameters = [p for p in left if p in found]
        left = {p: None for p in left if p not in found}
        shown = ", ".join(group.patterns)
        if not parameters:
            before = [g.name for g in groups if not found.isdisjoint(g.parameters)]
            why = f"the group of {'; '.join(before)} comes first"
            if not before:
                why = "model.freeze" if freezing.of(network) else "the network itself"
                why += " holds them still for the whole run"
            raise ConfigError(f"{key}={shown} names no parameters that are left to learn: {why}")
        groups.append(Group(shown, parameters, config.lr * group.lr_factor, decay, exempt))
    return [Group("the others", list(left), config.lr, config.weight_decay, 0.0), *groups]


def for_torch(groups: list[Group]) -> list[dict[str, Any]]:
    """As an optimizer of torch takes them: weights, and norms and biases where they decay less.

    The first has the optimizer's own rate, which is what a run logs, also where each parameter
    has a group.
    """
    others, *named = groups
    made: list[dict[str, Any]] = []
    for group in groups:
        weights = [p for p in group.parameters if p.ndim >= 2]
        small = [p for p in group.parameters if p.ndim < 2]
        rate = {} if group is others else {"lr": group.lr}
        for parameters, decay in ((weights, group.weight_decay), (small, group.exempt_decay)):
            if parameters or (not made and named and not others.parameters):
                made.append({"params": parameters, "weight_decay": decay, **rate})
    return made
