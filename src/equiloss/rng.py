"""The random generators of a rank: made independent of other ranks', saved and put back.

Order, augmentation and dropout do not use them (they are functions of seed, epoch and sample);
whatever else a network draws does.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from equiloss.data.keyed import Stream, keyed_bits


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
    found = {
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
        found[device.type] = torch.get_device_module(device).get_rng_state(device)
    return found


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
