"""The two sums of a step, mass and loss, against the same sums made otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from equiloss.distributed import collectives
from equiloss.losses import reduction
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Outputs
from equiloss.losses.signature import HEAD_WEIGHT
from equiloss.parity.agreement import Rows, Seen

if TYPE_CHECKING:
    from equiloss.training.step import StepOutcome


def mass_error(
    formulations: Iterable[Criterion], outcome: StepOutcome, rows: Rows, *, weighted: bool
) -> tuple[float, bool]:
    """Largest difference between a mass that was used and the oracle's, and the verdict.

    Args:
        formulations: Losses whose own mass is compared too.
        outcome: What the step used.
        rows: This rank's.
        weighted: Whether rows count by class weights.
    """
    n, dtype = rows.batch, rows.logits.dtype
    # Most have the same rule, which is evaluated once.
    rules = {(each.ignore_index, each.is_weighted): each for each in formulations}.values()
    masses = [each.mass(rows.target[:n], dtype).double() for each in rules]
    exact = rows.exact.masses[:n].sum()
    sums = torch.stack([exact, *masses, exact.new_tensor(n)])
    *summed, count = collectives.sum_over_ranks(sums).tolist()
    error = max(abs(mass - summed[0]) for mass in (*summed[1:], outcome.mass))
    if not weighted:
        return error, error == 0
    # Each rank's sum of weights rounds once per row.
    return error, error <= count * torch.finfo(dtype).eps * summed[0]


def global_error(outcome: StepOutcome, seen: Seen) -> tuple[float, bool]:
    """The loss that trained against the loss of the gathered global batch on one rank."""
    outputs, criterion = seen.outputs, seen.criterion
    everything = outputs.with_rows(collectives.gather_rows(outputs.rows))  # [N, K] or [N, D]
    target = collectives.gather_rows(seen.target)
    with torch.no_grad():
        losses = criterion.per_sample(everything, target)  # [N]
    mass = criterion.mass(target, losses.dtype)
    # Any two orders of summation differ by at most N · eps · sum of |terms|.
    loss, scale = reduction.mean(torch.stack([losses.sum(), losses.abs().sum()]), mass).tolist()
    error = abs(outcome.loss - loss)
    bound = len(losses) * torch.finfo(losses.dtype).eps * scale
    return error, error <= bound + _recomputation(everything)


def _recomputation(outputs: Outputs) -> float:
    """How far a row's loss may move, in nats, because its logits were made among other rows.

    Each product of a row and a class rounds D times (Higham, "Accuracy and stability", 2002,
    section 3.1), and a row's loss moves by twice the largest of them at most.
    """
    weight = outputs.head().get(HEAD_WEIGHT)
    if weight is None or not len(outputs.rows):
        return 0.0
    longest = outputs.rows.norm(dim=1).max() * weight.norm(dim=1).max()
    eps = torch.finfo(torch.promote_types(outputs.rows.dtype, torch.float32)).eps
    return float(2 * weight.shape[1] * eps * longest.item())
