"""Random changes of images: the same for each order, worker and world size, and in bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiloss.config import AugmentConfig
from equiloss.data.augment import TransformedSource, augment, build_transform, flip, shift
from equiloss.data.sampler import Slice
from equiloss.data.sources import ArraySource
from equiloss.errors import ConfigError, DataError


def images(n: int = 6, channels: int = 3, height: int = 7, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # No zeros, so that what a shift fills in can be told from what it moved.
    return torch.randint(
        1, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator
    )


def shifted_one_by_one(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    moved = torch.zeros_like(images)
    _, height, width = images.shape[1:]
    for image, target, (down, right) in zip(images, moved, offsets.tolist(), strict=True):
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    target[:, y, x] = image[:, y - down, x - right]
    return moved


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), max_size=5))
def test_shift_moves_pixels_and_fills_with_zero(offsets):
    batch = images(len(offsets))
    moves = torch.tensor(offsets, dtype=torch.int64).view(-1, 2)
    moved = shift(batch, moves)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved, shifted_one_by_one(batch, moves))


def test_flip_mirrors_the_chosen_images_and_is_its_own_inverse():
    batch = images(3)
    mask = torch.tensor([True, False, True])
    mirrored = flip(batch, mask)
    assert torch.equal(mirrored[1], batch[1])
    assert torch.equal(mirrored[0, :, :, 0], batch[0, :, :, -1])
    assert torch.equal(flip(mirrored, mask), batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_zero_rows_keep_their_shape(dtype):
    config = AugmentConfig(shift=2, flip=True)
    empty = torch.zeros(0, 3, 7, 5, dtype=dtype)
    changed = augment(empty, torch.zeros(0, dtype=torch.int64), 0, 0, config)
    assert changed.shape == empty.shape
    assert changed.dtype == dtype


@settings(deadline=None)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_augmentation_is_the_same_in_every_order_and_split(order, cut):
    config = AugmentConfig(shift=2, flip=True)
    batch, index = images(), torch.arange(10, 16)
    whole = augment(batch, index, 4, 9, config)
    rows = torch.tensor(order)
    parts = [augment(batch[part], index[part], 4, 9, config) for part in (rows[:cut], rows[cut:])]
    assert torch.equal(torch.cat(parts), whole[rows])


def test_augmentation_follows_seed_and_epoch():
    config = AugmentConfig(shift=2, flip=True)
    batch, index = images(50), torch.arange(50)
    changed = {
        augment(batch, index, epoch, seed, config).numpy().tobytes()
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(changed) == 9


def test_every_shift_within_the_limit_occurs_equally_often():
    n = 25 * 400
    pixel = torch.zeros(n, 1, 5, 5, dtype=torch.uint8)
    pixel[:, :, 2, 2] = 1
    moved = augment(pixel, torch.arange(n), 0, 0, AugmentConfig(shift=2))
    assert moved.sum() == n  # no pixel left the image, none was doubled
    counts = moved.double().sum(dim=0).flatten()  # [25], one for each offset
    # 400 each with a deviation of 20: six deviations are allowed.
    assert (counts - 400).abs().max() < 120


def test_turning_flip_on_does_not_alter_the_shifts():
    batch, index = images(20), torch.arange(20)
    shifted = augment(batch, index, 0, 0, AugmentConfig(shift=2))
    both = augment(batch, index, 0, 0, AugmentConfig(shift=2, flip=True))
    same = (both == shifted).flatten(1).all(dim=1)
    mirrored = (both == shifted.flip(3)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_nothing_configured_changes_nothing():
    batch = images()
    assert augment(batch, torch.arange(6), 0, 0, AugmentConfig()) is batch


CROP = [{"name": "RandomCrop", "size": [7, 5], "padding": 2}, {"name": "RandomHorizontalFlip"}]


def transformed(entries, seed: int = 1) -> TransformedSource:
    source = ArraySource(images(), torch.arange(6))
    return TransformedSource(source, build_transform(entries), seed)


def read(source: TransformedSource, rows: list[int], epoch: int = 0) -> torch.Tensor:
    return source.__getitems__(Slice(epoch, torch.tensor(rows, dtype=torch.int64))).images


def test_pipeline_depends_on_seed_epoch_and_sample_alone():
    source = transformed(CROP)
    whole = read(source, [0, 1, 2, 3, 4, 5])
    torch.manual_seed(99)
    assert torch.equal(read(source, [4, 1]), whole[[4, 1]])
    assert not torch.equal(read(source, [0, 1, 2, 3, 4, 5], epoch=1), whole)
    assert not torch.equal(read(transformed(CROP, seed=2), [0, 1, 2, 3, 4, 5]), whole)


def test_pipeline_without_a_seed_of_its_own_would_differ():
    """The control: the same pipeline on the global generator does depend on the order."""
    pipeline, batch = build_transform(CROP), images()
    torch.manual_seed(0)
    forwards = torch.stack([pipeline(image) for image in batch])
    torch.manual_seed(0)
    backwards = torch.stack([pipeline(image) for image in batch.flip(0)]).flip(0)
    assert not torch.equal(forwards, backwards)


def test_pipeline_leaves_the_source_and_the_global_generator_alone():
    source = transformed(CROP)
    before, stored = torch.get_rng_state(), source.source.images.clone()
    read(source, [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(source.source.images, stored)


def test_pipeline_takes_zero_rows():
    assert read(transformed(CROP), []).shape == (0, 3, 7, 5)


def test_steps_may_hold_steps():
    mirror = {"name": "RandomHorizontalFlip", "p": 1.0}
    always = [{"name": "RandomApply", "transforms": [mirror], "p": 1.0}]
    assert torch.equal(read(transformed(always), [2])[0], images()[2].flip(2))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "RandomCorp", "size": 4}], "Did you mean 'RandomCrop'"),
        ([{"name": "functional"}], "unknown transform of torchvision.transforms.v2"),
        (["RandomCrop"], "list of {name: ClassName"),
        ([{"size": 4}], "list of {name: ClassName"),
        ([{"name": "RandomCrop", "sise": 4}], "RandomCrop: .*'sise'"),
    ],
)
def test_a_pipeline_that_cannot_be_made_names_the_culprit(entries, message):
    with pytest.raises(ConfigError, match=message):
        build_transform(entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "CenterCrop", "size": 4}], r"image 3, \[3, 7, 5\] uint8, into \[3, 4, 4\]"),
        ([{"name": "ConvertImageDtype"}], "uint8, into .* float32"),
        ([{"name": "ToPILImage"}], "into a Image"),
        ([{"name": "RandomCrop", "size": 20}], "failed on train image 3"),
        (
            [{"name": "Normalize", "mean": [0.5], "std": [0.5]}],
            r"float tensor.*uint8 \[C, H, W\]; normalising and mixing come later, by data\.mean",
        ),
    ],
)
def test_a_pipeline_that_changes_type_or_shape_is_refused(entries, message):
    with pytest.raises(DataError, match=message):
        read(transformed(entries), [3])
