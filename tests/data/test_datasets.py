"""Datasets by name: what is read, how it is divided, and what options do."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equiloss.config import DataConfig
from equiloss.data.datasets import DATASETS, Splits, load
from equiloss.data.sampler import Slice
from equiloss.data.sources import ArraySource
from equiloss.data.splits import SPLITS
from equiloss.errors import ConfigError, DataError


def rows(splits: Splits, split: str, positions: list[int] | None = None):
    source = getattr(splits, split)
    positions = list(range(len(source))) if positions is None else positions
    return source.__getitems__(Slice(0, torch.tensor(positions, dtype=torch.int64)))


def all_images(splits: Splits) -> Counter[bytes]:
    return Counter(
        image.numpy().tobytes() for split in SPLITS for image in rows(splits, split).images
    )


# --- digits and synthetic ---


def test_digits_make_23_batches_of_50():
    splits = load(DataConfig(name="digits", val_fraction=0.2))
    assert [len(getattr(splits, split)) for split in SPLITS] == [1150, 288, 359]
    assert splits.class_counts.sum() == 1150
    assert splits.class_counts.dtype == torch.int64
    assert torch.equal(splits.class_counts, torch.bincount(splits.train.targets))
    assert splits.class_counts.max() - splits.class_counts.min() <= 6  # the whole set's is 9


def synthetic(**options) -> Splits:
    return load(DataConfig(name="synthetic", options=options))


def test_synthetic_is_deterministic_and_follows_its_options():
    first, second = synthetic(num_samples=90), synthetic(num_samples=90)
    assert torch.equal(rows(first, "train").images, rows(second, "train").images)
    assert all_images(synthetic(num_samples=90, seed=1)) != all_images(first)
    coloured = synthetic(num_samples=60, num_classes=4, channels=3, size=5)
    assert coloured.image_shape == (3, 5, 5)
    assert coloured.num_classes == 4


def test_synthetic_classes_can_be_told_apart():
    splits = synthetic()
    train, test = rows(splits, "train"), rows(splits, "test")
    means = torch.stack([train.images[train.target == k].double().mean(0) for k in range(10)])
    distance = torch.cdist(test.images.double().flatten(1), means.flatten(1))
    assert (distance.argmin(1) == test.target).double().mean() > 0.99


def test_imbalance_is_the_ratio_of_the_first_class_to_the_last():
    splits = synthetic(num_samples=4000, imbalance=20)
    total = sum(torch.bincount(getattr(splits, split).targets) for split in SPLITS)
    assert total.sum() == 4000
    assert (total[:-1] > total[1:]).all()
    assert total[0] / total[-1] == pytest.approx(20, rel=0.05)  # whole samples: 28 of the last


# --- options of every set ---


def test_max_samples_limits_each_split_at_random():
    splits = load(DataConfig(name="digits", max_samples=60))
    assert [len(getattr(splits, split)) for split in SPLITS] == [60, 60, 60]
    assert len(set(splits.test.targets.tolist())) == 10
    assert not all_images(splits) - all_images(load(DataConfig(name="digits")))


def test_image_size_resizes_images_in_memory():
    splits = load(DataConfig(name="digits", image_size=16))
    assert splits.image_shape == (1, 16, 16)
    assert rows(splits, "val").images.dtype == torch.uint8


def test_configured_statistics_replace_the_computed_ones():
    splits = load(DataConfig(name="digits", mean=[0.25], std=[0.5]))
    assert (splits.mean, splits.std) == ((0.25,), (0.5,))
    with pytest.raises(ConfigError, match=r"data\.mean has 3 values for 1 channels"):
        load(DataConfig(name="digits", mean=[0.1, 0.2, 0.3]))


def test_unknown_names_get_the_near_miss():
    with pytest.raises(ConfigError, match=r"unknown dataset 'digit'\. Did you mean 'digits'"):
        load(DataConfig(name="digit"))
    with pytest.raises(ConfigError, match=r"unknown option of data=synthetic 'sise'.*'size'"):
        synthetic(sise=4)
    with pytest.raises(ConfigError, match=r"data\.options\.size: data=digits has no options"):
        load(DataConfig(name="digits", options={"size": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, r"num_classes must be a whole number above 0"),
        ({"size": 2.5}, r"size must be of type int, got 2.5"),
        ({"imbalance": 0.5}, r"imbalance must be finite and at least 1"),
        ({"imbalance": math.nan}, r"imbalance must be finite and at least 1"),
        ({"num_samples": 29}, r"fewer than 3 samples"),
    ],
)
def test_synthetic_refuses_sizes_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        synthetic(**options)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("seed", [{"a": 1}], r"seed must be of type int, got \[\{'a': 1\}\]"),
        ("imbalance", "x", "imbalance must be of type float, got x"),
        ("size", True, "size must be of type int, got True"),
        # Refused before so many numbers are made.
        ("num_classes", 2**40, "num_samples=1000 leaves a class with fewer than 3"),
    ],
)
def test_options_of_another_type_or_beyond_the_samples_are_refused(option, value, words):
    with pytest.raises(ConfigError, match=rf"^data\.options\.{words}"):
        load(DataConfig(name="synthetic", options={option: value}))


def test_every_dataset_has_a_file_in_conf():
    conf = Path(__file__).parents[2] / "conf" / "data"
    assert {file.stem for file in conf.glob("*.yaml")} == set(DATASETS)
    for file in conf.glob("*.yaml"):
        assert f"\nname: {file.stem}\n" in file.read_text()


# --- custom ---


class Example:
    """What functions of users return, under names that `data.target` can reach."""

    @staticmethod
    def pairs(n: int = 6, k: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4)
        return {split: (images, torch.arange(n) % k) for split in SPLITS}


@pytest.fixture
def custom(monkeypatch):
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "example_sets", module)

    def make(function, **changes) -> Splits:
        module.function = function
        target = "example_sets:function"
        ignored = changes.pop("ignore_index", None)
        return load(DataConfig(name="custom", target=target, **changes), ignore_index=ignored)

    return make


def test_custom_mapping_is_taken_with_options(custom):
    splits = custom(Example.pairs, options={"n": 8, "k": 4})
    assert [len(getattr(splits, split)) for split in SPLITS] == [8, 8, 8]
    assert splits.class_names == ("0", "1", "2", "3")
    assert rows(splits, "val", [5]).images.unique().tolist() == [5]


def test_custom_sequence_of_arrays_is_taken(custom):
    images = np.zeros((4, 5, 5), dtype=np.uint8)
    images.flags.writeable = False  # as np.load with mmap_mode gives them
    splits = custom(lambda: [(images, [0, 1, 2, 1])] * 3)
    assert splits.image_shape == (1, 5, 5)
    assert splits.train.targets.dtype == torch.int64
    assert splits.class_counts.tolist() == [1, 2, 1]


def test_custom_class_names_and_ignored_rows(custom):
    def function():
        pairs = Example.pairs(4)
        images, _ = pairs["train"]
        pairs["train"] = images, torch.tensor([0, -100, 1, -100])
        return pairs | {"class_names": ["a", "b", "c"]}

    splits = custom(function)
    assert splits.class_names == ("a", "b", "c")
    assert splits.class_counts.tolist() == [1, 1, 0]


def test_custom_soft_targets_count_for_their_most_probable_class(custom):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    soft = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    splits = custom(lambda: [(images, soft)] * 3)
    assert splits.num_classes == 2
    assert splits.class_counts.tolist() == [2, 1]
    assert torch.equal(rows(splits, "test", [1]).target, soft[1:2])


def test_custom_splits_are_taken_as_they_are(custom):
    source = ArraySource(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3))
    splits = Splits(source, source, source, ("a", "b", "c"), (0.0,), (1.0,))
    assert custom(lambda: splits) == splits
    assert custom(lambda: splits, mean=[0.5]).mean == (0.5,)
    with pytest.raises(ConfigError, match=r"data\.image_size has no effect on the Splits"):
        custom(lambda: splits, image_size=4)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType"),
        ({"train": 1, "test": 2}, "a mapping with the keys train, test"),
        ([1, 2], "returned a list of 2"),
        ([1, 2, 3], "train is a int: it must be a pair"),
        (dict.fromkeys(SPLITS, (np.zeros((2, 4, 4)), [0, 1])), "float64 .* must be torch.uint8"),
        (
            dict.fromkeys(SPLITS, (np.zeros((2, 4, 4), dtype=np.uint8), [0, 1, 1])),
            "2 images and 3 targets",
        ),
        (
            dict.fromkeys(SPLITS, (np.zeros((2, 4, 4), dtype=np.uint8), [0.5, 1.0])),
            "integers .* or probabilities",
        ),
        (
            dict.fromkeys(SPLITS, (np.zeros((2, 4, 4), dtype=np.uint8), ["cat", "dog"])),
            "no array of numbers",
        ),
        (
            dict.fromkeys(SPLITS, (np.zeros((0, 4, 4), dtype=np.uint8), np.zeros(0, np.int64))),
            "split is empty",
        ),
    ],
)
def test_custom_refuses_what_is_no_dataset(custom, returned, message):
    with pytest.raises(DataError, match=message):
        custom(lambda: returned)


def test_custom_functions_that_cannot_be_called_are_named(custom):
    for target, message in (
        ("example_sets:missing", "data.target=example_sets:missing cannot be imported"),
        ("no_such_package.sets:function", "cannot be imported: No module named"),
        ("math:pi", "is a float, not a function"),
        ("math", "must read package.module:function"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(DataConfig(name="custom", target=target))
    with pytest.raises(ConfigError, match=r"does not go with data\.options: .*'m'"):
        custom(Example.pairs, options={"m": 3})


def labelled(targets: list[int]):
    images = torch.zeros(len(targets), 1, 4, 4, dtype=torch.uint8)
    return lambda: [(images, torch.tensor(targets))] * 3


@pytest.mark.parametrize(
    ("targets", "way_out"),
    [
        ([1, 2, 3], r"3 different targets \(1, 2 and 3\): .* subtract 1, or set .*num_classes=4"),
        ([5, 7, 11], r"3 different targets \(5, 7 and 11\): .* number them anew"),
        ([0, 1, 2, 9], r"set loss\.ignore_index=9 if it marks rows without a class"),
        (list(range(0, 700, 100)), r"\(0, 100, 200, 300, … and 600\)"),
    ],
)
def test_classes_are_not_guessed_from_targets_with_gaps(custom, targets, way_out):
    with pytest.raises(DataError, match=way_out):
        custom(labelled(targets))
    named = custom(labelled(targets), num_classes=max(targets) + 2)
    assert named.num_classes == max(targets) + 2
    (note,) = named.notes
    assert note.startswith(f"no training row for {named.num_classes - len(targets)} of")
    with pytest.raises(DataError, match=rf"has the target {max(targets)}: .*=2 ends below"):
        custom(labelled(targets), num_classes=2)


def test_the_ignored_target_is_no_class(custom):
    assert custom(labelled([0, 1, 2, 255]), ignore_index=255).num_classes == 3
    assert custom(labelled([0, 1, 2, -100])).num_classes == 3
    with pytest.raises(ConfigError, match=r"data\.num_classes belongs to data=custom"):
        DataConfig(name="digits", num_classes=10)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((6, 8, 8, 3), np.uint8), r"\[6, 8, 8, 3\], which looks like NHWC: .*moveaxis"),
        (np.zeros((6, 9, 7, 1), np.uint8), "looks like NHWC"),
        (np.zeros((6, 3, 8, 8), np.float32), "torch.uint8 .*; multiply by 255 and round"),
        (np.zeros((6, 64), np.uint8), r"they must be torch.uint8 \[N, C, H, W\]"),
    ],
)
def test_arrays_that_are_no_images_are_told_why(images, told):
    with pytest.raises(DataError, match=told):
        ArraySource(torch.from_numpy(images), torch.zeros(6, dtype=torch.int64))
    good = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="there are 6 images and 5 targets"):
        ArraySource(good, torch.zeros(5, dtype=torch.int64))
