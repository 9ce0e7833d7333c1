"""Optimizers and schedules by name: what decays, and the learning rate at every step."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from equiloss.config import OptimizerConfig, SchedulerConfig, TrainerConfig
from equiloss.errors import ConfigError
from equiloss.training.optim import (
    REFUSED_OPTIMIZERS,
    build_optimizer,
    build_scheduler,
    cosine,
    total_steps,
    without_search_for_gpus,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))


def learning_rates(
    name: str, steps: int, *, warmup_fraction: float = 0.0, lr: float = 1.0, **options: Any
) -> list[float]:
    """Learning rate of each optimizer step of a run."""
    optimizer = build_optimizer(OptimizerConfig(lr=lr), nn.Linear(1, 1))
    config = SchedulerConfig(name=name, warmup_fraction=warmup_fraction, options=options)
    scheduler = build_scheduler(config, optimizer, total_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestOptimizer:
    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "NAdam"])
    def test_any_of_torch_by_its_class_name(self, name):
        optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.25), network())
        assert type(optimizer) is getattr(optim, name)
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}

    def test_weights_decay_and_norms_and_biases_do_not(self):
        module = network()
        decayed, exempt = build_optimizer(OptimizerConfig(weight_decay=0.5), module).param_groups
        assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.5, 0)
        convolution, norm, _, linear = module
        weights = [convolution.weight, linear.weight]
        others = [convolution.bias, norm.weight, norm.bias, linear.bias]
        assert {id(p) for p in decayed["params"]} == {id(p) for p in weights}
        assert {id(p) for p in exempt["params"]} == {id(p) for p in others}

    def test_without_gradient_decay_alone_moves_the_weights(self):
        module = nn.Linear(2, 2)
        before = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        build_optimizer(OptimizerConfig(lr=0.5, weight_decay=0.5), module).step()
        assert torch.equal(module.weight, 0.75 * before[0])  # powers of two: no rounding
        assert torch.equal(module.bias, before[1])

    @pytest.mark.parametrize("name", ["Adam", "AdamW"])
    def test_adam_is_fused_where_nothing_forbids_it(self, name):
        module = nn.Linear(3, 2)
        trained = []
        for fused, options in ((True, {}), (True, {"fused": False}), (False, {})):
            own = copy.deepcopy(module)
            config = OptimizerConfig(name=name, lr=0.1, options=options)
            optimizer = build_optimizer(config, own, fused=fused)
            assert bool(optimizer.defaults["fused"]) is (fused and not options)
            own(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            trained.append(own.weight.detach())
        assert torch.equal(trained[1], trained[2])
        # One step in another order of roundings.
        torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-6)
        plain = OptimizerConfig(name="SGD", lr=0.1)
        assert not build_optimizer(plain, module, fused=True).defaults["fused"]

    def test_frozen_parameters_are_left_out(self):
        module = network()
        module[0].requires_grad_(False)
        groups = build_optimizer(OptimizerConfig(), module).param_groups
        assert sum(len(group["params"]) for group in groups) == 4

    def test_options_go_to_the_class(self):
        config = OptimizerConfig(options={"momentum": 0.9, "nesterov": True})
        group = build_optimizer(config, network()).param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (0.9, True)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"name": "sgd"}, r"unknown optimizer\.name 'sgd'. Did you mean 'SGD'"),
            ({"name": "AdmW"}, "Did you mean 'AdamW'"),
            ({"name": "lr_scheduler"}, "unknown optimizer.name"),
            (
                {"options": {"betas": [0.9, 0.99]}},
                "optimizer SGD has no option betas: .* ~optimizer.options.betas",
            ),
            ({"options": {"momentum": -1.0}}, "optimizer SGD: Invalid momentum"),
        ],
    )
    def test_what_it_does_not_take_is_refused(self, config, message):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(OptimizerConfig(**config), network())

    def test_decay_for_an_optimizer_without_it_is_refused(self):
        """torch takes the key in a parameter group and never reads it."""
        with pytest.raises(ConfigError, match="weight_decay"):
            build_optimizer(OptimizerConfig(name="Rprop", weight_decay=0.1), network())


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("asked_for", ["1", None])
def test_where_there_is_no_gpu_no_step_looks_for_nvidias_library(monkeypatch, gpus, asked_for):
    """And the environment is as before, also after a failure."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.delenv(name, raising=False)
    if asked_for is not None:
        monkeypatch.setenv(name, asked_for)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    @without_search_for_gpus()
    def fails() -> None:
        assert os.environ.get(name) == (asked_for if gpus else None)
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert os.environ.get(name) == asked_for


class TestSchedule:
    def test_constant(self):
        assert learning_rates("constant", 4, lr=0.5) == [0.5] * 4

    @pytest.mark.parametrize("name", ["constant", "cosine"])
    def test_warmup_is_linear_and_ends_at_the_peak(self, name):
        assert learning_rates(name, 8, warmup_fraction=0.5)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]

    @settings(deadline=None, derandomize=True, max_examples=30)
    @given(steps=st.integers(2, 50), data=st.data())
    def test_cosine_falls_from_the_peak_towards_0(self, steps, data):
        warmup = data.draw(st.integers(0, steps - 1))
        rates = [cosine(step, warmup, steps) for step in range(steps)]
        assert rates[warmup] == 1
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        assert rates[:warmup] == sorted(rates[:warmup])
        # The last step is one before the zero of the curve, which a late step does not leave.
        last = (1 - math.cos(math.pi / (steps - warmup))) / 2
        assert rates[-1] == pytest.approx(last, abs=1e-15)  # a few roundings of numbers below 1
        assert cosine(steps, warmup, steps) == cosine(steps + 1, warmup, steps) == 0

    def test_cosine_is_that_of_torch(self):
        optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        torchs = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        expected = []
        for _ in range(20):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            torchs.step()
        # torch multiplies factor by factor: 20 roundings.
        assert learning_rates("cosine", 20) == pytest.approx(expected, abs=20 * 2**-52)

    @pytest.mark.parametrize("steps", [1, 2, 3, 345])
    def test_one_cycle_lasts_exactly_the_run(self, steps):
        """One step too many and torch would raise."""
        rates = learning_rates("one_cycle", steps, lr=0.5)
        assert len(rates) == steps
        assert max(rates) <= 0.5

    def test_one_cycle_goes_up_to_the_peak_and_down_again(self):
        rates = learning_rates("one_cycle", 345, lr=0.5)
        top = rates.index(max(rates))
        assert rates[top] == pytest.approx(0.5, rel=1e-3)  # the peak lies between two steps
        assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
        assert rates[-1] < rates[0]

    def test_others_by_class_name_with_their_options(self):
        rates = learning_rates("StepLR", 4, step_size=2, gamma=0.5)
        assert rates == [1, 1, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"name": "cosin"}, r"unknown scheduler\.name 'cosin'. Did you mean 'cosine'"),
            ({"name": "steplr"}, "Did you mean 'StepLR'"),
            ({"name": "StepLR"}, r"^scheduler StepLR needs scheduler\.options\.step_size$"),
            ({"name": "CyclicLR", "options": {"base_lr": 0.1}}, "needs .*max_lr$"),
            (
                {"name": "StepLR", "options": {"step_size": 2, "x": 1}},
                "no option x: it takes step_size,",
            ),
            ({"name": "LambdaLR"}, r"scheduler\.name=LambdaLR is refused: it takes a function"),
            ({"name": "one_cycle", "options": {"pct": 0.1}}, "one_cycle has no option pct"),
            ({"name": "OneCycleLR", "options": {"max_lr": 1}}, "OneCycleLR: max_lr is not set"),
            ({"name": "one_cycle", "options": {"pct_start": 2.0}}, "scheduler one_cycle: "),
            ({"name": "cosine", "options": {"T_max": 5}}, "scheduler cosine.*T_max"),
            ({"name": "constant", "options": {"factor": 0.5}}, "scheduler constant.*factor"),
            ({"name": "one_cycle", "warmup_fraction": 0.3}, "warmup_fraction"),
            ({"name": "ReduceLROnPlateau"}, "ReduceLROnPlateau"),  # it wants a metric at each step
        ],
    )
    def test_what_it_does_not_take_is_refused(self, config, message):
        optimizer = build_optimizer(OptimizerConfig(), network())
        with pytest.raises(ConfigError, match=message):
            build_scheduler(SchedulerConfig(**config), optimizer, total_steps=10)


def offered(build: Callable[[str], Any]) -> list[str]:
    """The names that an error about an unknown one lists."""
    with pytest.raises(ConfigError) as caught:
        build("no such name")
    return str(caught.value).partition("Known: ")[2].split(", ")


def test_every_optimizer_that_is_offered_takes_a_step() -> None:
    def build(name: str) -> Optimizer:
        return build_optimizer(OptimizerConfig(name=name), module)

    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    names = offered(build)
    assert len(names) >= 12
    for name in names:
        module(torch.randn(2, 1, 4, 4)).sum().backward()
        build(name).step()
    for name in REFUSED_OPTIMIZERS:
        with pytest.raises(ConfigError, match=rf"optimizer\.name={name} is refused"):
            build(name)


def test_every_schedule_that_is_offered_is_built_or_says_what_it_needs() -> None:
    def build(name: str) -> LRScheduler:
        optimizer = build_optimizer(OptimizerConfig(), network())
        return build_scheduler(SchedulerConfig(name=name), optimizer, total_steps=9)

    names = offered(build)
    assert len(names) >= 12
    refused = {}
    for name in names:
        try:
            build(name)
        except ConfigError as error:
            refused[name] = str(error)
    assert 0 < len(refused) < len(names)
    for name, line in refused.items():
        assert re.fullmatch(rf"scheduler {name} needs [\w., ]+", line)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_warmup_that_leaves_nothing_of_the_run_is_refused(fraction):
    with pytest.raises(ConfigError, match=rf"warmup_fraction must lie in \[0, 1\), got {fraction}"):
        SchedulerConfig(warmup_fraction=fraction)


class TestTotalSteps:
    @pytest.mark.parametrize(
        ("config", "samples", "batch_size", "expected"),
        [
            ({"max_epochs": 3}, 100, 50, 6),
            ({"max_epochs": 3}, 101, 50, 9),  # a short batch is a step
            ({"max_epochs": 3}, 10, 50, 3),
            ({"max_epochs": None, "max_steps": 7}, 100, 50, 7),
            ({"max_epochs": 3, "max_steps": 5}, 100, 50, 5),
            ({"max_epochs": 3, "max_steps": 50}, 100, 50, 6),
        ],
    )
    def test_whatever_ends_the_run_first(self, config, samples, batch_size, expected):
        trainer = TrainerConfig(**config)
        assert total_steps(trainer, train_samples=samples, batch_size=batch_size) == expected
