"""Splits: a partition with the classes in proportion, and exact statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from equiloss.config import DataConfig
from equiloss.data.datasets import load
from equiloss.data.sampler import Slice
from equiloss.data.splits import channel_statistics, holdout, long_tailed
from equiloss.errors import ConfigError, DataError


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


def tail(targets: list[int], classes: int, ratio: float, split_seed: int = 0) -> torch.Tensor:
    config = DataConfig(name="digits", long_tail=ratio, split_seed=split_seed)
    rows = long_tailed(torch.tensor(targets), [str(label) for label in range(classes)], config)
    assert rows is not None
    return rows


class TestLongTail:
    @settings(deadline=None)
    @given(
        counts=st.lists(st.integers(40, 90), min_size=1, max_size=8),
        ratio=st.floats(1, 30),
        seed=st.integers(0, 100),
    )
    def test_sizes_fall_geometrically_and_are_as_large_as_they_can(self, counts, ratio, seed):
        targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        rows = tail(targets.tolist(), len(counts), ratio, seed)
        assert (rows[1:] > rows[:-1]).all()  # each once, in the order they had
        sizes = torch.bincount(targets[rows], minlength=len(counts)).tolist()
        steps = max(len(counts) - 1, 1)
        shares = [ratio ** -(k / steps) for k in range(len(counts))]
        first = min(count / share for count, share in zip(counts, shares, strict=True))
        for size, share, count in zip(sizes, shares, counts, strict=True):
            assert abs(size - first * share) <= 0.5 + 1e-9
            assert size <= count
        assert any(size == count for size, count in zip(sizes, counts, strict=True))

    def test_only_training_is_thinned_out(self):
        whole = load(DataConfig(name="digits", val_fraction=0.2))
        thin = load(DataConfig(name="digits", val_fraction=0.2, long_tail=20))
        assert thin.class_counts.tolist() == [113, 81, 58, 42, 30, 21, 15, 11, 8, 6]
        for split in ("val", "test"):
            assert torch.equal(getattr(thin, split).images, getattr(whole, split).images)
        assert (thin.mean, thin.std) == channel_statistics(thin.train.images)

    def test_rows_follow_the_split_seed_alone(self):
        targets = [0, 1] * 50
        first = tail(targets, 2, 10)
        torch.manual_seed(5)
        assert torch.equal(tail(targets, 2, 10), first)
        assert not torch.equal(tail(targets, 2, 10, split_seed=1), first)

    def test_rows_without_a_class_are_kept(self):
        rows = tail([0, -100] * 20 + [1] * 20, 2, 20)
        kept = torch.tensor([0, -100] * 20 + [1] * 20)[rows]
        assert [(kept == label).sum() for label in (-100, 0, 1)] == [20, 20, 1]

    def test_max_samples_is_drawn_from_the_tail(self):
        splits = load(DataConfig(name="digits", long_tail=20, max_samples=100))
        counts = splits.class_counts
        assert counts.sum() == 100
        assert counts[0] > 5 * counts[-1]

    def test_an_image_folder_has_one(self, tmp_path):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "train" / name).mkdir(parents=True)
            for number in range(20):
                pixels = np.full((4, 4, 3), 10 * label + number, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number:02}.png")
        config = DataConfig(name="image_folder", root=str(tmp_path), long_tail=5)
        splits = load(config)
        assert splits.class_counts.tolist() == [14, 3]
        assert splits.train.read(Slice(0, torch.tensor([len(splits.train) - 1]))).min() >= 10

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.tensor([0] * 50 + [1] * 5), "leaves class '1' without one of its 5 training"),
            (torch.tensor([0] * 50), "leaves class '1' without one of its 0 training samples"),
            (torch.full((4, 2), 0.5), "thins out classes: train targets are probabilities"),
        ],
    )
    def test_what_cannot_be_thinned_out_is_named(self, targets, message):
        with pytest.raises(DataError, match=message):
            long_tailed(targets, "01", DataConfig(name="digits", long_tail=200))

    @pytest.mark.parametrize("ratio", [0.5, -1.0, float("nan"), float("inf")])
    def test_a_ratio_below_1_is_refused(self, ratio):
        with pytest.raises(
            ConfigError, match=r"data\.long_tail must be finite and at least 1, got"
        ):
            DataConfig(name="digits", long_tail=ratio)
