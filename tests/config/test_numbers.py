"""Numbers that are no size of anything are refused where they enter, naming the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from equiloss.config import (
    AugmentConfig,
    DataConfig,
    EarlyStoppingConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainerConfig,
)
from equiloss.errors import ConfigError

KEYS: dict[str, Callable[[Any], Any]] = {
    "data.augment.mixup": lambda value: AugmentConfig(mixup=value),
    "data.augment.cutmix": lambda value: AugmentConfig(cutmix=value),
    "data.val_fraction": lambda value: DataConfig(name="digits", val_fraction=value),
    "data.test_fraction": lambda value: DataConfig(name="digits", test_fraction=value),
    "data.long_tail": lambda value: DataConfig(name="digits", long_tail=value),
    "data.mean": lambda value: DataConfig(name="digits", mean=[0.5, value]),
    "data.std": lambda value: DataConfig(name="digits", std=[0.5, value]),
    "data.worker_timeout_s": lambda value: DataConfig(name="digits", worker_timeout_s=value),
    "trainer.rank_timeout_s": lambda value: TrainerConfig(rank_timeout_s=value),
    "optimizer.lr": lambda value: OptimizerConfig(lr=value),
    "optimizer.weight_decay": lambda value: OptimizerConfig(weight_decay=value),
    "scheduler.warmup_fraction": lambda value: SchedulerConfig(warmup_fraction=value),
    "early_stopping.min_delta": lambda value: EarlyStoppingConfig(min_delta=value),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} must .*, got {value}$"):
        KEYS[key](value)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_no_number_per_channel_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{key} needs one number per channel, got \[\]$"):
        DataConfig(name="digits", **{key: []})


def test_an_infinite_norm_clips_nothing_and_no_number_is_refused() -> None:
    assert OptimizerConfig(gradient_clip_norm=math.inf).gradient_clip_norm == math.inf
    with pytest.raises(ConfigError, match=r"^optimizer\.gradient_clip_norm must be positive"):
        OptimizerConfig(gradient_clip_norm=math.nan)
