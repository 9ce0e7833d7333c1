"""Rates and decays by group: each parameter has one, and every schedule scales them all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from equiloss.config import ModelConfig, OptimizerConfig, SchedulerConfig
from equiloss.config.training import GroupConfig
from equiloss.errors import ConfigError
from equiloss.models import freezing
from equiloss.training.optim import REFUSED_OPTIMIZERS, build_optimizer, build_scheduler
from equiloss.training.parameter_groups import grouped
from stand_ins import normalised
from support import wrong_with

LR, DECAY = 0.5, 0.25
# Powers of two: factors round nothing.
GROUPS = [
    {"pattern": "stages.0", "lr_factor": 0.5},
    {"pattern": ["*.norm", "norm"], "lr_factor": 0.25, "weight_decay": 0.125},
    {"pattern": "stages", "lr_factor": 0.125, "weight_decay": None},
]


def made(groups: Any, name: str = "SGD", **options: Any) -> tuple[nn.Module, Optimizer]:
    """A network, and the optimizer of a module that holds it and a parameter beside it."""
    network = normalised(4, 1)
    module = nn.ModuleDict({"model": network, "criterion": nn.Bilinear(2, 2, 1)})
    config = OptimizerConfig(name, lr=LR, weight_decay=DECAY, groups=groups, options=options)
    return network, build_optimizer(config, module, network=network)


def settings(optimizer: Optimizer) -> dict[int, tuple[float, float]]:
    """Rate and decay of each parameter, by its identity."""
    found: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found, "it is in two groups"
            found[id(parameter)] = group["lr"], group["weight_decay"]
    return found


def test_the_first_pattern_that_matches_decides() -> None:
    network, optimizer = made(GROUPS)
    expected = {
        "stem.weight": (LR, DECAY),
        "norm.weight": (LR / 4, 0.125),
        "norm.bias": (LR / 4, 0.125),
        "stages.0.conv.weight": (LR / 2, DECAY),
        "stages.0.norm.weight": (LR / 2, 0.0),  # the optimizer's decay exempts it
        "stages.0.norm.bias": (LR / 2, 0.0),
        "stages.1.conv.weight": (LR / 8, DECAY),
        "stages.1.norm.weight": (LR / 4, 0.125),  # and a group's own does not
        "stages.1.norm.bias": (LR / 4, 0.125),
        "head.weight": (LR, DECAY),
        "head.bias": (LR, 0.0),
    }
    found = settings(optimizer)
    assert {name: found[id(p)] for name, p in network.named_parameters()} == expected
    # The loss's own are the network's in no pattern's eyes.
    assert sorted(found.values())[-3:] == [(LR, DECAY)] * 3
    assert len(found) == len(expected) + 2


@pytest.mark.parametrize("groups", [None, []])
def test_without_groups_there_are_the_two_that_there_were(groups: Any) -> None:
    network = normalised(4, 1)
    config = OptimizerConfig(lr=LR, weight_decay=DECAY, groups=groups)
    found = build_optimizer(config, network)
    weights = [p for p in network.parameters() if p.ndim >= 2]
    small = [p for p in network.parameters() if p.ndim < 2]
    pairs = ((weights, DECAY), (small, 0.0))
    plain = optim.SGD([{"params": each, "weight_decay": decay} for each, decay in pairs], lr=LR)
    assert found.state_dict() == plain.state_dict()
    for group, (expected, _) in zip(found.param_groups, pairs, strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, kind in vars(optim).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
        if name not in REFUSED_OPTIMIZERS and "weight_decay" in inspect.signature(kind).parameters
    ],
)
def test_the_first_group_has_the_base_rate_also_where_all_have_their_own(name: str) -> None:
    network = nn.Linear(3, 2)
    config = OptimizerConfig(name, lr=LR, groups=[{"pattern": "*", "lr_factor": 0.125}])
    optimizer = build_optimizer(config, network)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR / 8, LR / 8]
    before = network.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(network.weight, before)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {}),
        ("cosine", {}),
        ("one_cycle", {}),
        ("OneCycleLR", {"div_factor": 4.0}),
        ("StepLR", {"step_size": 3}),
        ("ExponentialLR", {"gamma": 0.5}),
        ("LinearLR", {}),
        ("PolynomialLR", {"total_iters": 8}),
        ("CosineAnnealingLR", {"T_max": 8}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
        ("CyclicLR", {"base_lr": 0.25, "max_lr": 2.0, "step_size_up": 3}),
    ],
)
def test_every_schedule_scales_them_all(name: str, options: dict[str, Any]) -> None:
    def rates(groups: Any) -> list[list[float]]:
        _, optimizer = made(groups, momentum=0.5)
        config = SchedulerConfig(name, options=options)
        scheduler = build_scheduler(config, optimizer, total_steps=9)
        seen = []
        for _ in range(9):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return seen

    groups = [{"pattern": "stages", "lr_factor": 0.125}, {"pattern": "head", "lr_factor": 4}]
    alone = [step[0] for step in rates(None)]
    # Of the others, and of each group its weights and its norms or biases.
    expected = [[rate * f for f in (1, 1, 0.125, 0.125, 4, 4)] for rate in alone]
    assert rates(groups) == expected  # to the bit: powers of two


def test_a_rate_that_torch_has_for_all_is_refused() -> None:
    _, optimizer = made([{"pattern": "head", "lr_factor": 4}])
    config = SchedulerConfig("CosineAnnealingLR", options={"T_max": 8, "eta_min": 0.1})
    with pytest.raises(ConfigError, match=r"^scheduler.options.eta_min=0.1 would be the rate of"):
        build_scheduler(config, optimizer, total_steps=8)
    build_scheduler(config, made(None)[1], total_steps=8)


def test_a_line_for_each_group_says_what_it_has() -> None:
    network = normalised(4, 1)
    config = OptimizerConfig(lr=LR, weight_decay=DECAY, groups=GROUPS)
    assert [str(group) for group in grouped(config, network, network)] == [
        "the others: 108 parameters, lr 0.5, decay 0.25 (0 of norms and biases)",
        "stages.0: 592 parameters, lr 0.25, decay 0.25 (0 of norms and biases)",
        "*.norm, norm: 32 parameters, lr 0.125, decay 0.125",
        "stages: 576 parameters, lr 0.0625, decay 0.25 (0 of norms and biases)",
    ]


def test_what_unfreezes_later_has_its_group_from_the_start() -> None:
    network = normalised(4, 1)
    config = ModelConfig(name="mlp", freeze="backbone", unfreeze_after_epochs=1)
    freezing.freeze(config, network, 4)
    optimizer = build_optimizer(OptimizerConfig("AdamW", weight_decay=DECAY), network)
    names = {id(p): name for name, p in network.named_parameters()}
    held = {names[each] for each in settings(optimizer)}
    assert held == {n for n in names.values() if "norm" not in n}
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network(torch.randn(3, 1, 4, 4)).sum().backward()
    optimizer.step()
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"pattern": "head"}, r"optimizer.groups is a list, \[\{pattern: layer1"),
        (["head"], r"optimizer.groups\[0\] is a pattern with what holds for it"),
        ([{"lr_factor": 2}], r"optimizer.groups\[0\] is a pattern"),
        ([{"pattern": "head", "lr": 2}], r"unknown key of optimizer.groups\[0\] 'lr'"),
        ([{"pattern": "head", "lr_factor": -1}], "lr_factor must be finite and at least 0"),
        ([{"pattern": "head", "lr_factor": float("inf")}], "lr_factor must be finite"),
        ([{"pattern": "head", "lr_factor": None}], "lr_factor must be a number, got None"),
        ([{"pattern": "head", "lr_factor": True}], "lr_factor must be a number"),
        ([{"pattern": "head", "weight_decay": float("nan")}], "weight_decay must be finite"),
        ([{"pattern": []}], r"pattern is a name such as layer1 .* got \[\]"),
        ([{"pattern": None}], "pattern is a name"),
        (
            [{"pattern": "head"}, {"pattern": ["stem", "haed"]}],
            r"unknown parameters in optimizer.groups\[1\].pattern 'haed'. Did you mean 'head'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        made(groups)
    assert wrong_with(str(refused.value)) is None


def test_a_group_that_has_nothing_to_teach_is_refused() -> None:
    shadowed = [{"pattern": ["stem", "stages"]}, {"pattern": "norm"}, {"pattern": "stages.?.norm"}]
    line = r"^optimizer.groups\[2\].pattern=stages.\?.norm names no parameters that are left to "
    with pytest.raises(ConfigError, match=line + "learn: the group of stem, stages comes first$"):
        made(shadowed)
    for epochs in (None, 1):
        network = normalised(4, 1)
        config = ModelConfig(name="mlp", freeze="backbone", unfreeze_after_epochs=epochs)
        freezing.freeze(config, network, 4)
        optimizer = OptimizerConfig(groups=[{"pattern": "stages"}])
        if epochs:
            assert grouped(optimizer, network, network)[1].parameters
            continue
        with pytest.raises(ConfigError, match=r"learn: model.freeze holds them still for the whol"):
            grouped(optimizer, network, network)


def test_a_group_is_what_was_given_and_a_layer_may_be_called_by_a_number() -> None:
    (group,) = OptimizerConfig(groups=[{"pattern": [0, "1.bias"]}]).groups
    assert group == GroupConfig([0, "1.bias"])
    assert group.patterns == ["0", "1.bias"]
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = OptimizerConfig(groups=[group])
    assert [len(each.parameters) for each in grouped(config, network, network)] == [1, 3]


def test_an_optimizer_without_decay_takes_none_in_a_group() -> None:
    config = OptimizerConfig("Rprop", groups=[{"pattern": "weight", "weight_decay": 0.1}])
    with pytest.raises(ConfigError, match=r"^optimizer Rprop has no weight_decay"):
        build_optimizer(config, nn.Linear(2, 2))
