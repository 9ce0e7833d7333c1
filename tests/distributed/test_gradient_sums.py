"""Numbers of a step that travel with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equiloss.distributed.gradient_sums import GradientSums
from equiloss.distributed.process_groups import run_ranks
from rank_functions import numbers_with_gradients


@pytest.mark.parametrize(
    ("world_size", "dtype", "numbers"),
    [
        (2, torch.float32, torch.float32),
        (3, torch.float64, torch.float64),
        # As with bf16-true: what is counted keeps its precision.
        (2, torch.bfloat16, torch.float32),
    ],
    ids=["two", "three", "of another dtype"],
)
def test_numbers_are_summed_with_the_gradients(
    world_size: int, dtype: torch.dtype, numbers: torch.dtype
) -> None:
    ranks = range(world_size)
    total = sum(rank + 1.0 for rank in ranks)
    # Times the ranks, and divided by them: exact for two.
    rounding = {"rel": 4 * torch.finfo(numbers).eps}
    for found in run_ranks(numbers_with_gradients, world_size, dtype, numbers):
        for step, sums in enumerate(found["sums"], start=1):
            assert sums == pytest.approx([step * total, sum(ranks)], **rounding)
        used, unused = found["gradients"]
        assert used == pytest.approx([2 * total / world_size] * 3, rel=4 * torch.finfo(dtype).eps)
        assert unused == [0, 0]
        assert found["names"] == ["0", "1"]


def test_alone_numbers_and_loss_stay_as_they_are() -> None:
    module, sums = nn.Linear(2, 1), GradientSums()
    sums.settle(module)
    loss, numbers = module.weight.sum(), torch.tensor([2.0, 1.0])
    assert sums.start(loss, numbers, [module.weight]) is loss
    assert sums.finish() is numbers
