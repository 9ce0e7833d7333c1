"""Splits: a partition with the classes in proportion, and exact statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiloss.data.splits import channel_statistics, holdout


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(3, 40), min_size=1, max_size=8),
    val_fraction=st.floats(0.01, 0.99),
    test_fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_three_splits_are_a_partition_with_every_class_in_each(
    counts, val_fraction, test_fraction, seed
):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rest, test = holdout(targets, test_fraction, seed=seed, reserve=2)
    train, val = holdout(targets[rest], val_fraction, seed=seed)
    parts = [rest[train], rest[val], test]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(targets)))
    for part in parts:
        assert set(targets[part].tolist()) == set(range(len(counts)))


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=8),
    fraction=st.floats(0.1, 0.9),
)
def test_held_out_classes_have_their_share(counts, fraction):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    _, held = holdout(targets, fraction, seed=0)
    got = torch.bincount(targets[held], minlength=len(counts)).tolist()
    quotas = [fraction * count for count in counts]
    assert all(abs(a - b) < 1 for a, b in zip(got, quotas, strict=True))
    assert abs(sum(got) - sum(quotas)) <= 0.5 + 1e-9  # rounding of the sum itself


def test_split_follows_its_seed_and_not_the_global_generator():
    targets = torch.arange(200) % 4
    first = holdout(targets, 0.3, seed=1)[1]
    torch.manual_seed(5)
    assert torch.equal(holdout(targets, 0.3, seed=1)[1], first)
    assert not torch.equal(holdout(targets, 0.3, seed=2)[1], first)


def test_rare_classes_stay_in_training():
    kept, held = holdout(torch.tensor([0] * 50 + [1]), 0.5, seed=0)
    assert 50 in kept
    assert 50 not in held


def test_statistics_are_those_of_float64():
    images = torch.randint(
        0, 256, (20, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    # Both sides sum 1,260 float64 numbers below 1.
    tolerance = 1260 * torch.finfo(torch.float64).eps
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=tolerance)
    expected = pixels.std(dim=(0, 2, 3), correction=0).tolist()
    assert std == pytest.approx(expected, abs=tolerance)


def test_a_constant_channel_has_a_deviation_of_one():
    images = torch.full((5, 1, 3, 3), 77, dtype=torch.uint8)
    assert channel_statistics(images) == ((pytest.approx(77 / 255),), (1.0,))
