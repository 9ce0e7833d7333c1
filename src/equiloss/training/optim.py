"""Optimizers and learning-rate schedules of torch, by name.

Schedules advance once per optimizer step; their length is worked out from the configuration
before training begins, so that a resumed run follows the same curve.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from equiloss.config import OptimizerConfig, SchedulerConfig, TrainerConfig
from equiloss.errors import ConfigError, unknown
from equiloss.training import parameter_groups

# Their dozen operations per parameter take longer than the step of a small network; in one kernel
# they are three times as fast on a CPU.
FUSED = ("Adam", "AdamW")
# Has torch ask NVIDIA's management library (NVML) for GPUs; Lightning sets it as it is imported.
BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
# Options of schedules that are learning rates, of which torch takes one for each group.
RATES = {"base_lr", "max_lr"}
# Arguments of OneCycleLR that the run itself gives.
OF_THE_RUN = {"max_lr", "total_steps", "epochs", "steps_per_epoch"}
# What torch has and a run cannot use.
REFUSED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times in a step",
    "Muon": "it takes matrices alone, and networks have biases and filters",
    "SparseAdam": "it takes sparse gradients alone",
}
REFUSED_SCHEDULES = {
    "ReduceLROnPlateau": "it follows the validations, and a schedule here is a function of the "
    "step, the same on all ranks and after a resume; take cosine, or early stopping "
    "(callbacks=early_stopping)",
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "it takes a function"),
    **dict.fromkeys(("ChainedScheduler", "SequentialLR"), "it takes other schedules"),
}


@contextmanager
def without_search_for_gpus() -> Iterator[None]:
    """Where there is no GPU, spare each step the search for a library that would know of one.

    Adam asks torch in each step whether there is one. Without NVIDIA's library the loader looks for
    it in all its directories, a twentieth of a small network's step, and torch asks CUDA after all.
    """
    before = os.environ.get(BY_NVML)
    if before is None or torch.cuda.device_count():
        yield
        return
    del os.environ[BY_NVML]
    try:
        yield
    finally:
        os.environ[BY_NVML] = before


def build_optimizer(
    config: OptimizerConfig,
    module: nn.Module,
    *,
    network: nn.Module | None = None,
    fused: bool = False,
) -> Optimizer:
    """Build the optimizer over a module's parameters, in groups (see `parameter_groups`).

    Args:
        config: Name, rates and options.
        module: Whose parameters are trained.
        network: The part of it whose names `config.groups` is for (None: all of it).
        fused: Whether a fused kernel may do it where the options say nothing: it rounds
            differently, and unscales gradients of half precision by itself.

    Raises:
        ConfigError: for an unknown name, with the near miss, an option it does not take, or a
            pattern that matches nothing.
    """
    known = _subclasses(optim, Optimizer)
    _check_name("optimizer.name", config.name, known, REFUSED_OPTIMIZERS)
    takes = inspect.signature(getattr(optim, config.name)).parameters
    decays = [config.weight_decay, *(group.weight_decay for group in config.groups)]
    if any(decays) and "weight_decay" not in takes:
        raise ConfigError(f"optimizer {config.name} has no weight_decay: set it to 0")
    groups = parameter_groups.grouped(config, module, module if network is None else network)
    foreign = sorted(config.options.keys() - takes.keys())
    if foreign:
        words = " ".join(f"~optimizer.options.{key}" for key in foreign)
        raise ConfigError(
            f"optimizer {config.name} has no option {', '.join(foreign)}: where that came with the "
            f"file of another optimizer, start from optimizer=adamw or leave it out, as {words}"
        )
    options = dict(config.options)
    if fused and config.name in FUSED and not {"foreach", "capturable"} & options.keys():
        options = {"fused": True} | options
    try:
        optimizer: Optimizer = getattr(optim, config.name)(
            parameter_groups.for_torch(groups), lr=config.lr, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.name}: {error}") from error
    return optimizer


def build_scheduler(
    config: SchedulerConfig, optimizer: Optimizer, *, total_steps: int
) -> LRScheduler:
    """Build the schedule over a whole run.

    Args:
        config: Name, warm-up and options.
        optimizer: Its current learning rates are the peak; each group's follows its own.
        total_steps: Optimizer steps of the run.

    Raises:
        ConfigError: for an unknown name, with the near miss, or an option that the schedule does
            not take.
    """
    warmup = int(config.warmup_fraction * total_steps)
    known = [each for each in _subclasses(lr_scheduler, LRScheduler) if each != "_LRScheduler"]
    names = ["constant", "cosine", "one_cycle", *known]
    _check_name("scheduler.name", config.name, names, REFUSED_SCHEDULES)
    if config.name in ("constant", "cosine"):
        if config.options:
            raise ConfigError(
                f"scheduler {config.name} takes no options, got {', '.join(config.options)}"
            )
    elif config.warmup_fraction:
        raise ConfigError(
            "scheduler.warmup_fraction belongs to constant and cosine, and came with a file of "
            f"theirs or the command: give scheduler=constant scheduler.name={config.name}, and its "
            "own arguments as scheduler.options.<argument>"
        )
    if config.name not in ("constant", "cosine"):
        _check_options(config)
    options = _of_groups(config, optimizer)
    try:
        if config.name == "constant":
            return LambdaLR(optimizer, lambda step: _warmup(step, warmup))
        if config.name == "cosine":
            return LambdaLR(optimizer, lambda step: cosine(step, warmup, total_steps))
        if config.name in ("one_cycle", "OneCycleLR"):
            peak = [float(group["lr"]) for group in optimizer.param_groups]
            # One step more: the schedule is advanced after the last optimizer step as well.
            return OneCycleLR(optimizer, peak, total_steps=total_steps + 1, **options)
        made: LRScheduler = getattr(lr_scheduler, config.name)(optimizer, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler {config.name}: {error}") from error
    return made


def cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the peak learning rate: a linear warm-up, then half a cosine down to 0.

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts.

    >>> [round(cosine(step, 2, 6), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def total_steps(config: TrainerConfig, *, train_samples: int, batch_size: int) -> int:
    """Optimizer steps of a run that goes to its end.

    >>> total_steps(TrainerConfig(max_epochs=2), train_samples=101, batch_size=50)
    6
    """
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.max_epochs is not None:
        limits.append(config.max_epochs * math.ceil(train_samples / batch_size))
    return min(limits)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _check_options(config: SchedulerConfig) -> None:
    """Refuse arguments that a schedule of torch does not take, and a lack of those that it needs.

    Raises:
        ConfigError: naming them.
    """
    kind = OneCycleLR if config.name == "one_cycle" else getattr(lr_scheduler, config.name)
    _, *parameters = inspect.signature(kind).parameters.values()
    takes = {each.name: each.default is each.empty for each in parameters}
    if kind is OneCycleLR:
        if taken := sorted(OF_THE_RUN & config.options.keys()):
            raise ConfigError(
                f"scheduler {config.name}: {', '.join(taken)} is not set here: its peak is "
                "optimizer.lr, and its length that of the run"
            )
        takes = {name: False for name in takes if name not in OF_THE_RUN}
    if foreign := sorted(config.options.keys() - takes.keys()):
        raise ConfigError(
            f"scheduler {config.name} has no option {', '.join(foreign)}: it takes "
            f"{', '.join(takes)}"
        )
    needs = [name for name, needed in takes.items() if needed and name not in config.options]
    if needs:
        lacking = ", ".join(f"scheduler.options.{name}" for name in needs)
        raise ConfigError(f"scheduler {config.name} needs {lacking}")


def _of_groups(config: SchedulerConfig, optimizer: Optimizer) -> dict[str, Any]:
    """The options of a schedule, those that are learning rates for each group by its factor.

    Raises:
        ConfigError: for a rate that torch has for all groups together.
    """
    base = optimizer.defaults["lr"]
    factors = [float(group["lr"]) / base for group in optimizer.param_groups]
    options: dict[str, Any] = dict(config.options)
    if set(factors) == {1.0}:
        return options
    for key in RATES & options.keys():
        if isinstance(options[key], int | float):
            options[key] = [options[key] * factor for factor in factors]
    if options.get("eta_min"):
        raise ConfigError(
            f"scheduler.options.eta_min={options['eta_min']} would be the rate of every group of "
            "optimizer.groups: leave it out"
        )
    return options


def _check_name(key: str, name: str, known: list[str], refused: Mapping[str, str]) -> None:
    if name in refused:
        raise ConfigError(f"{key}={name} is refused: {refused[name]}")
    if name not in known:
        raise ConfigError(unknown(key, name, [each for each in known if each not in refused]))


def _subclasses(module: object, base: type) -> list[str]:
    members: Iterable[tuple[str, object]] = vars(module).items()
    return sorted(
        name
        for name, value in members
        if isinstance(value, type) and issubclass(value, base) and value is not base
    )
