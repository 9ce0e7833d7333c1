"""Random numbers: functions of a key, and the generators of a rank.

A generator's numbers depend on how often it was asked before, and so on the rank, the worker
and the order of the samples. A hash of (seed, epoch, sample index, draw) depends on nothing else:
order, augmentation and dropout use it. Whatever else a network draws comes from the generators,
which are made independent of other ranks', saved and put back.
"""

from __future__ import annotations

import math
import random
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Uses of the same key that must not share their numbers."""

    SPLIT = 0
    ORDER = 1
    AUGMENT = 2
    TRANSFORMS = 3
    SYNTHETIC = 4
    DROPOUT = 5
    RANK = 6
    MIX = 7
    LONG_TAIL = 8


def keyed_bits(
    seed: int, epoch: int, index: Tensor, draws: int, *, stream: Stream = Stream.AUGMENT
) -> Tensor:
    """64 hashed bits for each sample and draw, the same on every device.

    The finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) after each part of the key.

    Args:
        seed: The run's seed, in [0, 2**63).
        epoch: Pass over the training split, from 0.
        index: Sample positions [N] int64.
        draws: Numbers per sample.
        stream: What the numbers are for.

    Returns:
        [N, draws] int64, every bit pattern equally likely.
    """
    key = 0
    for part in (int(stream), seed, epoch):
        key = _mixed(key + _GOLDEN + part)
    sample = _mix(index + _signed(key))  # [N]
    steps = torch.arange(1, draws + 1, device=index.device) * _GOLDEN
    return _mix(sample[:, None] + steps)  # [N] -> [N, draws]


def keyed_uniform(
    seed: int, epoch: int, index: Tensor, draws: int, *, stream: Stream = Stream.AUGMENT
) -> Tensor:
    """Uniform numbers in [0, 1) for each sample and draw, the same on every device.

    Arguments are those of `keyed_bits`.

    Returns:
        [N, draws] float32, multiples of 2**-24 (which float32 holds exactly on every device;
        some have no float64).

    >>> both = keyed_uniform(0, 3, torch.tensor([5, 9]), 2)
    >>> torch.equal(both[1:], keyed_uniform(0, 3, torch.tensor([9]), 2))
    True
    """
    return _uniform(keyed_bits(seed, epoch, index, draws, stream=stream))


def keyed_bernoulli(p: float, keys: Tensor, number: int, draws: int) -> Tensor:
    """Events of probability p, [N, draws] bool, from keys [N] that are hashes themselves.

    Args:
        p: Taken in float32, and upwards to a multiple of 2**-24.
        keys: Hashed keys [N] int64, of `keyed_bits`.
        number: Which use of the same keys this is, from 0.
        draws: Numbers per key.
    """
    key = _mix(keys + _signed((number + 1) * _STEP % 2**64))  # [N]
    steps = torch.arange(1, draws + 1, device=keys.device) * _GOLDEN
    return _upper(_mix(key[:, None] + steps)) < math.ceil(np.float32(p) * 2**24)


def _uniform(bits: Tensor) -> Tensor:
    return _upper(bits).to(torch.float32) * 2.0**-24


def _upper(bits: Tensor) -> Tensor:
    """The upper 24 bits, as a number."""
    return _shift_right(bits, 40)


def _signed(pattern: int) -> int:
    return pattern - (1 << 64) if pattern >= 1 << 63 else pattern


_GOLDEN = _signed(0x9E3779B97F4A7C15)
# Another odd step: the multiplier of Steele & Vigna, "LXM", OOPSLA 2021.
_STEP = _signed(0xD1342543DE82EF95)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    # torch shifts the sign bit in; the hash needs zeros.
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(bits: Tensor) -> Tensor:
    # int64 products wrap modulo 2**64 on the CPU and on accelerators alike.
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _mixed(bits: int) -> int:
    """`_mix` of a number modulo 2**64, unsigned: a tenth of the time of a tensor's."""
    bits %= 2**64
    bits = (bits ^ bits >> 30) * _MIX_1 % 2**64
    bits = (bits ^ bits >> 27) * _MIX_2 % 2**64
    return bits ^ bits >> 31


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators.

    Not Lightning's function of this name: it sets variables of the environment, which the ranks
    of a multirun's next job would inherit.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed the generators of one rank of several, from a step on, unlike the other ranks'."""
    bits = keyed_bits(seed, step, torch.tensor([rank]), 1, stream=Stream.RANK)
    seed_everything(int(bits) % 2**32)


def seed_shard(seed: int, step: int, shard: int, device: torch.device) -> None:
    """Seed the generators for one virtual shard of one step."""
    number = (seed << 31) + (step << 10) + shard
    random.seed(number)
    np.random.seed(number % 2**32)
    # torch.manual_seed takes a note for each accelerator that is not there, in half a millisecond.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def state(device: torch.device) -> dict[str, Any]:
    """State of every generator that a step on this device may draw from, as plain data."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    states = {
        "python": [version, list(words), gauss],
        "numpy": {
            **numpy,
            "state": {
                "key": numpy["state"]["key"].tolist(),
                "pos": int(numpy["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Put the generators back where `state` found them; another kind of device keeps its own."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(saved["numpy"]["state"]["key"], dtype=np.uint32)
    numpy = {**saved["numpy"], "state": {**saved["numpy"]["state"], "key": key}}
    np.random.set_state(numpy)
    torch.set_rng_state(saved["torch"].cpu())
    if device.type in saved:
        torch.get_device_module(device).set_rng_state(saved[device.type].cpu(), device)
