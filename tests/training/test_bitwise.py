"""The same bits on any number of devices, and what would spoil them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rank_functions
from equiloss.config import TrainerConfig
from equiloss.data.torchvision_sets import DEBIAN_FASHION_MNIST
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import ConfigError
from equiloss.records.results import Result, read_metrics
from equiloss.run import run
from equiloss.training.bitwise import tree_sum
from support import Run, composed, slow

BITWISE = {"trainer": {"reduction": "bitwise"}}


def state(run_dir: Path) -> list[Tensor]:
    """Weights and optimizer state after the last step."""
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    moments = [
        value
        for _, values in sorted(optimizer["state"].items())
        for _, value in sorted(values.items())
        if isinstance(value, Tensor)
    ]
    assert moments
    return [*(saved["state_dict"][name] for name in sorted(saved["state_dict"])), *moments]


def same_bits(run_dir: Path, reference: Path) -> bool:
    losses = (read_metrics(place, "train/loss") for place in (run_dir, reference))
    pairs = zip(state(run_dir), state(reference), strict=True)
    return len(set(map(tuple, losses))) == 1 and all(torch.equal(a, b) for a, b in pairs)


ALL = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("optimizer", "steps", "world_sizes"),
    [
        ("SGD", 30, (1, 3)),
        pytest.param("SGD", 60, ALL, marks=slow),
        pytest.param("AdamW", 60, ALL, marks=slow),
    ],
)
def test_steps_are_the_same_bits_on_any_number_of_processes(
    optimizer: str, steps: int, world_sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """Augmentation, dropout, class weights, smoothing, and a short last batch of 22 rows."""
    for world_size in world_sizes:
        place = tmp_path / str(world_size)
        run_ranks(rank_functions.train_bitwise, world_size, place, optimizer, steps, BITWISE)
    assert len(read_metrics(tmp_path / "1", "train/loss")) == steps
    for world_size in world_sizes[1:]:
        assert same_bits(tmp_path / str(world_size), tmp_path / "1"), world_size


def test_the_ordinary_reduction_is_not_the_same_bits(tmp_path: Path) -> None:
    for world_size in (1, 2):
        place = tmp_path / str(world_size)
        run_ranks(rank_functions.train_bitwise, world_size, place, "SGD", 10)
    assert not same_bits(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize(("killed_on", "continued_on"), [(2, 1), pytest.param(1, 2, marks=slow)])
def test_killed_and_continued_on_other_devices_to_the_bit(
    killed_on: int, continued_on: int, tmp_path: Path
) -> None:
    train = rank_functions.train_bitwise_until
    run_ranks(train, 1, tmp_path / "whole", None)
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(train, killed_on, tmp_path / "killed", 13)
    run_ranks(train, continued_on, tmp_path / "killed", None)
    assert len(Result.read(tmp_path / "killed").segments) == 2
    assert same_bits(tmp_path / "killed", tmp_path / "whole")


@slow
@pytest.mark.real_data
@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_an_epoch_of_fashion_mnist_is_the_same_bits(tmp_path: Path) -> None:
    for world_size in (1, 2):
        place = tmp_path / str(world_size)
        run_ranks(rank_functions.train_fashion_mnist, world_size, place, "bitwise")
    assert same_bits(tmp_path / "2", tmp_path / "1")


@slow
def test_what_draws_from_the_generators_draws_the_same(tmp_path: Path) -> None:
    for world_size in (1, 2):
        run_ranks(rank_functions.train_noisy, world_size, tmp_path / str(world_size))
    assert same_bits(tmp_path / "2", tmp_path / "1")


class TestTree:
    @pytest.mark.parametrize("shards", [1, 2, 8, 16])
    def test_any_aligned_branches_give_the_whole_trees_bits(self, shards: int) -> None:
        terms = torch.randn(shards, 100, generator=torch.Generator().manual_seed(0)).unbind()
        whole = tree_sum(terms)
        ranks = 1
        while ranks <= shards:
            each = shards // ranks
            branches = [tree_sum(terms[r * each : (r + 1) * each]) for r in range(ranks)]
            assert torch.equal(tree_sum(branches), whole)
            ranks *= 2

    def test_another_order_gives_other_bits(self) -> None:
        terms = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(tree_sum(terms.unbind()), terms.cumsum(0)[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 6}, "trainer.shards must be a power of two, got 6"),
        ({"micro_batch_size": 5}, "bitwise has micro-batches of its own"),
        ({"devices": 9}, "shares 8 shards, and trainer.devices is 9"),
        ({"precision": "16-mixed", "accelerator": "gpu"}, "does not scale gradients"),
    ],
)
def test_what_would_spoil_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(reduction="bitwise", **options)


def test_batch_normalisation_is_refused(tmp_path: Path) -> None:
    network = ("model=custom", "model.target=stand_ins:batch_norm", "callbacks=quiet")
    with pytest.raises(
        ConfigError, match=r"^trainer\.reduction=bitwise refuses .* depend on the samples beside it"
    ):
        run(composed(*network, "trainer.reduction=bitwise"), tmp_path)


def test_ranks_with_other_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="same number of CPU threads on every rank, and they"):
        run_ranks(rank_functions.train_with_unequal_threads, 2, tmp_path, BITWISE)


def test_threads_do_not_follow_from_the_devices() -> None:
    assert TrainerConfig(reduction="bitwise").cpu_threads == 1
    assert TrainerConfig(reduction="bitwise", threads=2).cpu_threads == 2
    assert TrainerConfig().cpu_threads is None


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.precision=bf16-mixed",),
        ("optimizer.gradient_clip_norm=0.5", "data.augment.mixup=0.4"),
        ("loss=linear_cross_entropy", "data.batch_size=5"),  # shards without a row
    ],
    ids=["bf16", "clip and mixup", "features, empty shards"],
)
def test_it_is_the_same_loss_as_ever(
    options: tuple[str, ...], run_here: Run, tmp_path: Path
) -> None:
    fast = ("data.max_samples=100", "trainer.max_steps=6", "parity.every_n_steps=2", "logger=csv")
    found = run_here(*fast, *options, "trainer.reduction=bitwise", directory=tmp_path / "bitwise")
    assert found.parity["agree"]
    run_here(*fast, *options, directory=tmp_path / "sum")
    # A rounding of bfloat16 in the first step, which five more amplify; or six steps in float32.
    steps, tolerance = (1, 2**-8) if "bf16" in options[0] else (6, 1e-4)
    for name in ("train/loss", "train/grad_norm"):
        ours, usual = (read_metrics(tmp_path / place, name)[:steps] for place in ("bitwise", "sum"))
        assert len(ours) == steps
        assert ours == pytest.approx(usual, rel=tolerance)
