"""Where the work is split, what a network does is said in one line, or refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from equiloss.errors import ConfigError
from equiloss.preflight.behaviour import Effect, Found
from equiloss.preflight.network import check_single_rows, judge
from support import composed

DRAWS, NEIGHBOURS, LEARNS, COUNTS, REMEMBERS, EVALUATION, UNKNOWN = Effect
MICRO = "trainer.micro_batch_size=10"
BITWISE = "trainer.reduction=bitwise"
EVERYTHING = [Found(effect, "a (Layer)") for effect in Effect]
BATCH_NORM = [Found(NEIGHBOURS, "1 (BatchNorm2d)", True), Found(LEARNS, "1 (BatchNorm2d)", True)]


def lines(
    caplog: pytest.LogCaptureFixture, found: list[Found], ranks: int, *options: str
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        judge(composed(*options).config, found, ranks)
    return caplog.messages


@pytest.mark.parametrize(
    ("ranks", "options", "effects"),
    [
        (1, (), set()),
        (1, ("trainer.micro_batch_size=1000",), set()),  # more than a batch
        (2, (), {DRAWS, NEIGHBOURS, LEARNS, REMEMBERS, EVALUATION, UNKNOWN}),
        (1, (MICRO,), {DRAWS, NEIGHBOURS, LEARNS, COUNTS, REMEMBERS, UNKNOWN}),
        (2, (MICRO,), set(Effect)),
    ],
)
def test_an_effect_is_said_where_its_split_is(
    ranks: int, options: tuple[str, ...], effects: set[Effect], caplog: pytest.LogCaptureFixture
) -> None:
    for found in EVERYTHING:
        said = lines(caplog, [found], ranks, *options)
        assert len(said) == (found.effect in effects), found
        for line in said:
            assert line.startswith("model=convnet: a (Layer) ")
            depend = "may depend" if found.effect == UNKNOWN else "depend"
            assert f": results {depend} on trainer." in line


def test_batch_norm_goes_over_all_ranks_and_not_over_micro_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert lines(caplog, BATCH_NORM, 2) == []
    (line,) = lines(caplog, BATCH_NORM, 2, MICRO)
    assert "1 (BatchNorm2d) makes a sample's logits depend on the samples beside it" in line


@pytest.mark.parametrize("found", EVERYTHING, ids=lambda found: found.effect)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bitwise_refuses_all_but_what_is_drawn_for_each_shard(ranks: int, found: Found) -> None:
    config = composed(BITWISE).config
    if found.effect == DRAWS:
        judge(config, [found], ranks)
        return
    with pytest.raises(ConfigError, match=rf"^{BITWISE} refuses model=convnet: a \(Layer\) "):
        judge(config, [found], ranks)


def test_strict_parity_refuses_what_the_split_makes_matter() -> None:
    config = composed("parity=strict").config
    judge(config, EVERYTHING, 1)
    with pytest.raises(ConfigError, match=r"^parity\.policy=raise refuses model=convnet: a "):
        judge(config, EVERYTHING, 2)


@pytest.mark.parametrize(
    ("overrides", "ranks", "refused"),
    [
        # 1,150 training rows: the last of the batches of 383 has one.
        (["data.batch_size=383"], 1, "data.batch_size=383 .* single row (1150 training rows)"),
        (["data.batch_size=383"], 2, "data.batch_size=383 .* single row (1150 training rows)"),
        (["data.batch_size=382"], 1, None),
        (
            ["data.batch_size=25", "trainer.micro_batch_size=8"],
            1,
            "micro_batch_size=8 .*25",
        ),
        # 13 and 12 rows: the third passes have 5 and 4.
        (
            ["data.batch_size=25", "trainer.micro_batch_size=4"],
            2,
            "micro_batch_size=4 .*25",
        ),
        (["data.batch_size=25", "trainer.micro_batch_size=8"], 2, None),
    ],
)
def test_a_single_row_is_refused_where_a_network_minds(overrides, ranks, refused):
    config = composed("data.val_fraction=0.2", *overrides).config
    minds = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    before = {name: value.clone() for name, value in minds.state_dict().items()}
    given = (1150, ranks)
    # It minds no single row, and is right.
    plain = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10))
    check_single_rows(config, plain, lambda rows: torch.randn(rows, 1, 8, 8), *given)
    if refused is None:
        check_single_rows(config, minds, lambda rows: torch.randn(rows, 1, 8, 8), *given)
        return
    with pytest.raises(ConfigError, match=refused.replace("(", "\\(").replace(")", "\\)")):
        check_single_rows(config, minds, lambda rows: torch.randn(rows, 1, 8, 8), *given)
    assert all(torch.equal(value, before[name]) for name, value in minds.state_dict().items())


@pytest.mark.parametrize(("size", "last"), [(383, 1), (50, 0), (574, 2), (100, 50)])
def test_a_last_batch_of_few_rows_is_pointed_out(size, last, caplog):
    config = composed(f"data.batch_size={size}").config
    with caplog.at_level(logging.WARNING):
        check_single_rows(config, nn.Flatten(), lambda rows: torch.zeros(rows, 1, 8, 8), 1150, 1)
    said = f"the last batch of each epoch has {last} of its rows, and moves the weights"
    assert (said in caplog.text) == (last in (1, 2))
