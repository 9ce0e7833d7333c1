"""Global batches: a partition of the split by (seed, epoch), whatever the number of ranks."""

from __future__ import annotations

import pickle
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiloss.data.sampler import GlobalBatchSampler, Slice
from equiloss.randomness import Stream, keyed_bits, keyed_uniform

lengths = st.integers(1, 60)
batch_sizes = st.integers(1, 25)
worlds = st.integers(1, 9)


def ids(sampler: GlobalBatchSampler) -> list[list[int]]:
    return [part.indices.tolist() for part in sampler]


@settings(deadline=None)
@given(length=lengths, batch_size=batch_sizes, world_size=worlds, epoch=st.integers(0, 5))
def test_ranks_together_see_the_global_batches_of_one_rank(length, batch_size, world_size, epoch):
    ranks = [
        GlobalBatchSampler(
            length, batch_size, seed=3, shuffle=True, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    alone = GlobalBatchSampler(length, batch_size, seed=3, shuffle=True)
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
    slices = [ids(sampler) for sampler in ranks]
    assert {len(part) for part in slices} == {len(alone)} == {len(ids(alone))}
    assert [list(chain(*parts)) for parts in zip(*slices, strict=True)] == ids(alone)
    sizes = [[len(part) for part in parts] for parts in zip(*slices, strict=True)]
    assert all(max(parts) - min(parts) <= 1 for parts in sizes)


@settings(deadline=None)
@given(length=lengths, batch_size=batch_sizes)
def test_an_epoch_is_a_permutation_with_a_short_last_batch(length, batch_size):
    batches = ids(GlobalBatchSampler(length, batch_size, seed=1, shuffle=True))
    assert sorted(chain(*batches)) == list(range(length))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len(batches[-1]) == (length - 1) % batch_size + 1


def test_order_is_a_function_of_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = GlobalBatchSampler(100, 7, seed=seed, shuffle=True)
        sampler.set_epoch(epoch)
        torch.rand(seed + epoch)  # what the global generator did does not matter
        return ids(sampler)

    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = [order(*key) for key in keys]
    assert orders == [order(*key) for key in keys]
    assert len({str(order) for order in orders}) == len(keys)


def test_iterating_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(GlobalBatchSampler(100, 7, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffling_the_order_is_that_of_the_split_in_every_epoch():
    sampler = GlobalBatchSampler(7, 3, seed=5, shuffle=False)
    sampler.set_epoch(4)
    assert ids(sampler) == [[0, 1, 2], [3, 4, 5], [6]]


def test_ranks_without_a_sample_get_empty_slices():
    sampler = GlobalBatchSampler(4, 3, shuffle=False, rank=0, world_size=4)
    assert ids(sampler) == [[], []]
    assert all(part.indices.dtype == torch.int64 for part in sampler)


def test_start_batch_leaves_batches_out_once():
    sampler = GlobalBatchSampler(20, 3, shuffle=True)
    whole = ids(sampler)
    sampler.start_batch = 4
    assert ids(sampler) == whole[4:]
    assert len(sampler) == len(whole)  # Lightning finds an epoch's last batch by the length
    assert ids(sampler) == whole


def test_slices_carry_the_epoch_they_were_drawn_in():
    sampler = GlobalBatchSampler(6, 3, shuffle=True)
    sampler.set_epoch(2)
    iterator = iter(sampler)
    first = next(iterator)
    sampler.set_epoch(3)  # between two batches: the iteration keeps its epoch
    assert [first.epoch, next(iterator).epoch] == [2, 2]
    assert next(iter(sampler)).epoch == 3


def test_a_slice_does_not_hold_the_whole_order():
    part = next(iter(GlobalBatchSampler(1000, 5, shuffle=True)))
    assert part.indices.untyped_storage().nbytes() == 5 * 8
    assert pickle.loads(pickle.dumps(Slice(0, part.indices))).indices.tolist() == (
        part.indices.tolist()
    )


def test_keyed_numbers_depend_on_the_key_and_not_on_their_neighbours():
    index = torch.arange(1000)
    whole = keyed_uniform(7, 2, index, 3)
    shuffled = index[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(keyed_uniform(7, 2, shuffled, 3), whole[shuffled])
    assert torch.equal(keyed_uniform(7, 2, index, 2), whole[:, :2])
    others = [(8, 2, Stream.AUGMENT), (7, 3, Stream.AUGMENT), (7, 2, Stream.ORDER)]
    for seed, epoch, stream in others:
        assert not (keyed_uniform(seed, epoch, index, 3, stream=stream) == whole).any(dim=1).all()


def splitmix_finaliser(z: int) -> int:
    """The finaliser in unbounded integers: an oracle for 64-bit wrap-around and shifts."""
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000), index=st.integers(0, 2**40 - 1))
def test_hash_wraps_like_unsigned_64_bit_arithmetic(seed, epoch, index):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    key = 0
    for part in (Stream.AUGMENT, seed, epoch):
        key = splitmix_finaliser((key + golden + part) & mask)
    sample = splitmix_finaliser((key + index) & mask)
    expected = [splitmix_finaliser((sample + (draw + 1) * golden) & mask) for draw in range(3)]
    got = keyed_bits(seed, epoch, torch.tensor([index]), 3)[0].tolist()
    assert [bits & mask for bits in got] == expected
    uniform = keyed_uniform(seed, epoch, torch.tensor([index]), 3)[0].tolist()
    assert uniform == [(bits >> 40) * 2.0**-24 for bits in expected]


@pytest.mark.parametrize("axis", ["index", "epoch", "seed", "draw"])
def test_uniform_numbers_are_uniform_along_every_part_of_the_key(axis):
    n, bins = 64_000, 64
    if axis == "index":
        numbers = keyed_uniform(0, 0, torch.arange(n), 1)
    elif axis == "draw":
        numbers = keyed_uniform(0, 0, torch.tensor([0]), n)
    else:
        keys = [(key, 0) if axis == "seed" else (0, key) for key in range(n // 100)]
        numbers = torch.cat([keyed_uniform(*key, torch.arange(100), 1) for key in keys])
    counts = torch.histc(numbers, bins, 0, 1)
    chi_square = ((counts - n / bins) ** 2 / (n / bins)).sum().item()
    # 63 degrees of freedom: the mean is 63 and the deviation 11.2; six deviations are allowed.
    assert chi_square < 63 + 6 * 11.2
    assert numbers.min() >= 0
    assert numbers.max() < 1
