"""Generators of a rank: saved as plain data, put back to the bit, unlike those of other ranks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from equiloss import randomness

CPU = torch.device("cpu")


def draws() -> list[float]:
    """From every generator; a Gauss that is drawn in pairs leaves one behind."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def test_a_saved_state_is_plain_data_and_goes_back_to_the_bit(tmp_path: Path) -> None:
    randomness.seed_everything(3)
    draws()
    torch.save(randomness.state(CPU), tmp_path / "state")
    expected = draws()
    draws()
    randomness.restore(torch.load(tmp_path / "state", weights_only=True), CPU)
    assert draws() == expected


def test_every_generator_is_seeded() -> None:
    randomness.seed_everything(1)
    first = draws()
    randomness.seed_everything(2)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    randomness.seed_everything(1)
    assert draws() == first


@pytest.mark.parametrize("other", [(0, 0, 2), (0, 1, 1), (1, 0, 1)])
def test_ranks_steps_and_seeds_draw_differently(other: tuple[int, int, int]) -> None:
    randomness.seed_rank(0, 0, 1)
    first = draws()
    randomness.seed_rank(*other)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
