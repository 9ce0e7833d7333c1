"""One step's gradient for every split of a batch; and that the matrix notices the usual mean."""

from __future__ import annotations

import pytest
import torch

from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance import batch_norm, gradients, steps
from equiloss.invariance.cells import CONTROL_AT_LEAST
from support import slow


@pytest.mark.parametrize(
    "world_size",
    [pytest.param(size, marks=[slow] if size in (2, 4) else []) for size in steps.WORLD_SIZES],
)
def test_every_split_has_the_gradient_of_one_device(world_size: int) -> None:
    parts = gradients.measure((world_size,))
    assert parts.keys() == {"gradients_float64", "gradients_float32"}
    for part in parts.values():
        cells = part.cells
        # Six cases, two more where there are several ranks; formulations; micro-batches.
        assert len(cells) == (8 if world_size > 1 else 6) * 3 * 3
        assert [cell for cell in cells if not cell.holds] == []
        controls = [cell.control for cell in cells if cell.control_differs]
        assert len(controls) >= 18
        assert min(controls) > CONTROL_AT_LEAST
        nothing = [cell for cell in cells if cell.row.startswith("everything ignored")]
        assert [(cell.figure, cell.bound) for cell in nothing] == [(0, 0)] * 9


def test_the_matrix_fails_for_a_mean_of_local_means() -> None:
    from rank_functions import cells_with_local_means

    cells = run_ranks(cells_with_local_means, 2, torch.float64)[0]
    for cell in cells:
        # Rows of equal mass on both ranks, but for the odd one.
        if cell.row.startswith(("label smoothing", "soft targets", "everything ignored")):
            continue
        assert not cell.holds, cell


def test_slices_and_micro_batches_are_what_the_table_says() -> None:
    for world_size in steps.WORLD_SIZES:
        longest = -(-steps.ROWS // world_size)
        for micro_batches in steps.MICRO_BATCHES:
            size = -(-longest // micro_batches)
            assert -(-longest // size) == micro_batches


def test_batch_norm_over_ranks_is_that_of_one_device() -> None:
    part = batch_norm.measure((3,))["batch_norm"]
    assert part.holds
    assert sum(cell.control_differs for cell in part.cells) == 4
