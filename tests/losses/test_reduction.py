"""Sums over real ranks: the gradient of one device, however the rows are spread."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.losses import reduction
from equiloss.losses.criterion import Criterion

each_world_size = pytest.mark.parametrize("world_size", [1, 2, 3])


@each_world_size
def test_sums_and_maxima_over_ranks(world_size):
    from rank_functions import sums

    for rank, got in enumerate(run_ranks(sums, world_size)):
        assert got["world_size"] == world_size
        assert (
            got["sum"]
            == got["start_sum"]
            == [
                sum(r + 1 for r in range(world_size)),
                -sum(range(world_size)),
            ]
        )
        assert got["max"] == [world_size, 0]
        assert got["own"] == [rank + 1, -rank]  # the arguments are left as they were
        assert got["pending"] == (world_size > 1)


def test_two_sums_may_be_under_way_together():
    from rank_functions import two_sums_at_once

    assert run_ranks(two_sums_at_once, 3) == [[60, 6]] * 3


@pytest.mark.parametrize("counts", [[2], [0], [3, 1], [0, 2], [2, 0, 3], [0, 0, 0]])
def test_rows_are_gathered_in_rank_order(counts):
    from rank_functions import gathered

    expected = [
        pytest.approx([rank + number / 100] * 2)  # float32 rounds the sum
        for rank, count in enumerate(counts)
        for number in range(count)
    ]
    classes = [rank for rank, count in enumerate(counts) for _ in range(count)]
    for got_rows, got_classes in run_ranks(gathered, len(counts), counts):
        assert got_rows == expected
        assert got_classes == classes


def test_without_a_process_group_there_is_one_rank():
    value = torch.tensor([1.0, 2.0])
    assert collectives.world_size() == 1
    assert torch.equal(collectives.sum_over_ranks(value), value)
    assert torch.equal(collectives.max_over_ranks(value), value)
    assert torch.equal(collectives.gather_rows(value), value)
    # A sum is a value of its own: what is done to it does not reach the argument.
    collectives.sum_over_ranks(value).zero_()
    assert value.tolist() == [1, 2]


class TestMean:
    def test_a_quotient(self):
        assert reduction.mean(torch.tensor(6.0), torch.tensor(4.0)) == 1.5

    def test_without_mass_it_is_0_with_exactly_zero_gradient(self):
        total = torch.tensor(3.0, requires_grad=True)
        loss = reduction.mean(total, torch.tensor(0.0))
        assert loss.item() == 0
        assert torch.autograd.grad(loss, total)[0].item() == 0

    def test_the_control_pytorch_has_no_number_there(self):
        logits, ignored = torch.zeros(2, 3), torch.tensor([-100, -100])
        assert math.isnan(F.cross_entropy(logits, ignored))


class TestGradientIdentity:
    """The ranks' average of the gradient of `rank_loss` is the gradient of one device."""

    N, D, C = 11, 4, 3
    OPTIONS = (
        {},
        {"weight": [0.2, 1.0, 4.0]},
        {"weight": [0.2, 1.0, 4.0], "label_smoothing": 0.1},
    )

    @pytest.mark.parametrize("targets", ["hard", "ignored", "soft"])
    @pytest.mark.parametrize("counts", [[11], [8, 3], [11, 0], [5, 0, 6]], ids=str)
    def test_it_holds_for_uneven_and_empty_slices(self, counts, targets):
        from rank_functions import data_parallel_gradients

        generator = torch.Generator().manual_seed(len(counts))
        weights = torch.randn(self.D, self.C, dtype=torch.float64, generator=generator)
        images = torch.randn(self.N, self.D, dtype=torch.float64, generator=generator)
        target = torch.arange(self.N) % self.C
        if targets == "ignored":
            target[:4] = -100
        if targets == "soft":
            target = torch.randn(self.N, self.C, generator=generator).double().softmax(-1)

        ranks = run_ranks(
            data_parallel_gradients, len(counts), weights, images, target, counts, 2, self.OPTIONS
        )
        for options, got in [
            pair for rank in ranks for pair in zip(self.OPTIONS, rank, strict=True)
        ]:
            alone = weights.clone().requires_grad_()
            loss = F.cross_entropy(images @ alone, target, **_as_tensors(options))
            (expected,) = torch.autograd.grad(loss, alone)
            # Float64 sums of a dozen terms of size 1, in another order: some 1e-15.
            assert _distance(got["rank_loss"], expected) < 1e-12
            control = _distance(got["local_means"], expected)
            # The mean of local means weighs a rank's rows by how few they are.
            assert control < 1e-12 if len(counts) == 1 else control > 1e-3

    def test_any_split_adds_up_on_one_device_too(self):
        """Micro-batches alone: every way to cut five rows gives the same gradient."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        target = torch.tensor([0, 2, -100, 1, 1])
        criterion = Criterion("cross_entropy", weight=[1.0, 5.0, 0.5], label_smoothing=0.1)
        mass = criterion.mass(target, torch.float64)
        (expected,) = torch.autograd.grad(reduction.mean(*criterion(logits, target)), logits)
        for cuts in itertools.product([False, True], repeat=4):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [5]
            losses = [
                reduction.rank_loss(criterion(logits[a:b], target[a:b]).total, mass)
                for a, b in itertools.pairwise([0, *ends])
            ]
            (gradient,) = torch.autograd.grad(sum(losses), logits)
            # Each row's gradient is computed alone; a dozen float64 roundings.
            torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-16)


def _as_tensors(options: dict[str, Any]) -> dict[str, Any]:
    if "weight" not in options:
        return options
    return {**options, "weight": torch.tensor(options["weight"], dtype=torch.float64)}


def _distance(got: list[list[float]], expected: Tensor) -> float:
    return (torch.tensor(got, dtype=torch.float64) - expected).abs().max().item()


class TestRunRanks:
    @each_world_size
    def test_every_rank_is_there(self, world_size):
        from rank_functions import rank

        assert run_ranks(rank, world_size) == list(range(world_size))

    def test_ranks_may_return_tensors(self):
        from rank_functions import own_tensor

        for _ in range(3):  # a rank that ended before its tensor was read would fail now and then
            first, second, third = run_ranks(own_tensor, 3)
            assert [first[0], second[1], third[2]] == [0, 1, 2]

    @pytest.mark.parametrize("culprit", [0, 1])
    def test_a_rank_that_raises_is_named_with_its_traceback(self, culprit):
        from rank_functions import one_rank_raises

        with pytest.raises(RuntimeError, match=f"rank {culprit} failed") as caught:
            run_ranks(one_rank_raises, 2, culprit)
        assert f"LookupError: this is rank {culprit}'s own mistake" in str(caught.value)
        assert "in one_rank_raises" in str(caught.value)

    @pytest.mark.parametrize("culprit", [0, 1])
    def test_a_rank_that_dies_is_named(self, culprit):
        from rank_functions import one_rank_dies

        with pytest.raises(RuntimeError, match=f"rank {culprit} died"):
            run_ranks(one_rank_dies, 2, culprit)

    def test_a_failure_leaves_nothing_behind(self):
        from rank_functions import one_rank_raises, rank

        with pytest.raises(RuntimeError):
            run_ranks(one_rank_raises, 2, 1)
        assert run_ranks(rank, 2) == [0, 1]
