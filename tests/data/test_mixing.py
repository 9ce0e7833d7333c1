"""MixUp and CutMix: of the global batch, however divided; drawn by (seed, epoch, batch)."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rank_functions
from equiloss.config import AugmentConfig
from equiloss.data.mixing import Mix, draw, mix_images, mix_targets
from equiloss.data.sampler import GlobalBatchSampler
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import ConfigError, DataError
from equiloss.invariance.rank_runs import read_records
from equiloss.invariance.trajectories import weight_difference

HEIGHT, WIDTH = 8, 6


def drawn(batch: int = 0, *, seed: int = 0, epoch: int = 0, **config: float) -> Mix:
    mix = draw(AugmentConfig(**config), seed, epoch, batch, height=HEIGHT, width=WIDTH)
    assert mix is not None
    return mix


def images(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.rand(rows, 2, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(
    rows=st.integers(1, 20),
    world_size=st.integers(1, 5),
    batch=st.integers(0, 9),
    cut=st.booleans(),
)
def test_slices_together_are_the_mixed_global_batch(rows, world_size, batch, cut):
    mix = drawn(batch, **({"cutmix": 1.0} if cut else {"mixup": 0.4}))
    whole, target = images(rows), torch.arange(rows) % 3
    before = whole.roll(1, 0)
    if mix.box is None:
        expected = mix.share * whole + (1 - mix.share) * before
    else:
        top, bottom, left, right = mix.box
        cutout = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        cutout[top:bottom, left:right] = True
        expected = torch.where(cutout, before, whole)
    one_hot = torch.eye(3, dtype=torch.float64)
    probabilities = mix.share * one_hot[target] + (1 - mix.share) * one_hot[target.roll(1)]

    mixed, mixed_target = [], []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            rows, rows, shuffle=False, rank=rank, world_size=world_size, lead=True
        )
        (part,) = sampler
        mixed.append(mix_images(whole[part.indices], mix, lead=part.lead))
        mixed_target.append(
            mix_targets(
                target[part.indices], mix, lead=part.lead, num_classes=3, dtype=torch.float64
            )
        )
    assert torch.equal(torch.cat(mixed), expected)
    assert torch.equal(torch.cat(mixed_target), probabilities)


def test_a_resumed_epoch_knows_the_numbers_of_its_batches():
    sampler = GlobalBatchSampler(10, 3, shuffle=True, lead=True)
    whole = [(part.number, part.indices.tolist()) for part in sampler]
    sampler.start_batch = 2
    assert [(part.number, part.indices.tolist()) for part in sampler] == whole[2:]


class TestDraw:
    def test_it_is_a_function_of_seed_epoch_and_batch(self):
        keys = [(seed, epoch, batch) for seed in (0, 1) for epoch in (0, 1) for batch in (0, 1)]
        shares = [
            drawn(batch, seed=seed, epoch=epoch, mixup=1.0).share for seed, epoch, batch in keys
        ]
        torch.rand(3)  # what the global generator did does not matter
        again = [
            drawn(batch, seed=seed, epoch=epoch, mixup=1.0).share for seed, epoch, batch in keys
        ]
        assert shares == again
        assert len(set(shares)) == len(keys)

    @pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
    def test_shares_are_those_of_a_beta_distribution(self, alpha: float):
        shares = [drawn(batch, mixup=alpha).share for batch in range(4000)]
        deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
        # Five standard errors of 4,000 draws; of the deviation they are below 2 % of it.
        assert abs(statistics.mean(shares) - 0.5) < 5 * deviation / 4000**0.5
        assert statistics.stdev(shares) == pytest.approx(deviation, rel=0.1)

    def test_the_share_is_what_the_box_leaves(self):
        for batch in range(200):
            mix = drawn(batch, cutmix=1.0)
            kept = mix_images(
                torch.eye(2).view(2, 2, 1, 1).expand(2, 2, HEIGHT, WIDTH), mix, lead=1
            )
            # The second of two images is 1 in its second channel, the first is 0 there.
            assert kept[0, 1].mean().item() == pytest.approx(mix.share, abs=1e-6)  # float32

    def test_boxes_touch_every_pixel(self):
        ends = [drawn(batch, cutmix=1.0).box for batch in range(500)]
        assert {0} < {box[0] for box in ends}
        assert {box[1] for box in ends} > {HEIGHT}
        assert {box[3] for box in ends} > {WIDTH}

    def test_with_both_each_batch_gets_one(self):
        cut = [drawn(batch, mixup=1.0, cutmix=1.0).box is not None for batch in range(1000)]
        assert abs(sum(cut) - 500) < 5 * 250**0.5  # five standard errors

    def test_off_is_off(self):
        assert draw(AugmentConfig(), 0, 0, 0, height=HEIGHT, width=WIDTH) is None


def test_soft_targets_are_mixed_as_they_are():
    target = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    mixed = mix_targets(target, Mix(0.75), lead=1, num_classes=2, dtype=torch.float32)
    assert mixed.tolist() == [[0.625, 0.375]]


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_a_negative_concentration_is_refused(key: str):
    with pytest.raises(
        ConfigError, match=rf"data.augment.{key} must be finite and at least 0, got"
    ):
        AugmentConfig(**{key: -1.0})


def test_rows_without_a_class_are_refused(run_here):
    with pytest.raises(DataError, match=r"train target \d+ is 7 \(ignored\), and .*mixup"):
        run_here("data.augment.mixup=1", "loss.ignore_index=7")


def test_a_loss_of_classes_alone_is_refused(run_here):
    by_path = ("loss=custom", "loss.target=stand_ins:missing_weight")
    with pytest.raises(ConfigError, match="'custom' takes classes: use one with soft targets"):
        run_here(*by_path, "data.augment.cutmix=1")


def test_training_does_not_depend_on_the_ranks(tmp_path: Path):
    """Fifteen float64 steps with a short last slice, both kinds of mixing, real processes."""
    for world_size in (1, 3):
        run_ranks(rank_functions.train_mixed, world_size, tmp_path / str(world_size))
    alone = read_records(tmp_path / "1" / "records.jsonl")
    assert read_records(tmp_path / "3" / "records.jsonl") == alone
    # Float64 rounds at 1e-16; a few steps of training amplify it.
    assert weight_difference(tmp_path / "3", tmp_path / "1") < 1e-12
