"""The configuration against the loss: which formulations a parity check may have."""

from __future__ import annotations

import pytest

from equiloss.config import Config, ParityConfig
from equiloss.errors import ConfigError
from equiloss.losses import Criterion
from equiloss.parity.monitor import ParityMonitor
from equiloss.preflight.configuration import check_losses
from support import composed


def config(*overrides: str) -> Config:
    return composed(*overrides).config


@pytest.mark.parametrize("name", ["cross_entopy", "custom"])
def test_an_unknown_formulation_is_refused_with_those_that_can_be_compared(name: str) -> None:
    wrong = config(f"parity.formulations=[cross_entropy,{name}]")
    with pytest.raises(ConfigError, match=rf"unknown parity\.formulations '{name}'") as caught:
        check_losses(wrong, Criterion("cross_entropy"), 10)
    offered = str(caught.value).partition("Known: ")[2].split(", ")
    assert len(offered) > 8
    criterion = Criterion("cross_entropy")
    for each in offered:
        one = ParityConfig(formulations=[each])
        made = ParityMonitor(one, criterion, total_steps=1, seed=0, class_counts=[9] * 10)
        assert [*made.formulations] == [each]


def test_custom_is_one_where_it_trains() -> None:
    words = (
        "loss=custom",
        "loss.target=stand_ins:off_by_a_percent",
        "parity.formulations=[custom]",
    )
    trained = config(*words)
    check_losses(trained, Criterion(**trained.loss), 10)
    for no_check in (
        config("parity=off", "parity.formulations=[none]"),
        config("task=test", "ckpt_path=best.ckpt", "parity.formulations=[none]"),
    ):
        check_losses(no_check, Criterion("focal"), 10)
