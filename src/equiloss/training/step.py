"""One optimizer step on a global batch: mass, micro-batches, clipping, guard.

The mass of the whole global batch (all ranks, all micro-batches) is known before the first
backward pass, so that each micro-batch contributes exactly its part of

    loss = sum of per-sample losses / mass

and the result does not depend on how the batch was split. It needs the targets alone: where rows
differ in what they count, its sum over ranks travels while the network runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from equiloss.distributed import collectives, interruption
from equiloss.errors import NonFiniteError
from equiloss.losses import reduction, registry
from equiloss.losses.projection import Outputs, joined

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.bitwise import Shards
    from equiloss.training.classifier import Classifier


@dataclass
class Accumulated:
    """What the passes of one step have added up, when the parameters have their gradient."""

    sums: Tensor
    """Sum of the losses of the global batch in nats, and number of ranks that were asked to stop
    [2]."""
    mass: Tensor
    """Mass of the global batch, 0-dim."""
    outputs: Outputs
    """The network's outputs for this rank's rows, without their graph."""
    target: Tensor
    """This rank's targets [n] or [n, K]."""


class StepOutcome(NamedTuple):
    """What one step saw and did."""

    loss: float
    """Loss of the global batch, in nats; 0 where its mass is 0."""
    mass: float
    """Mass of the global batch."""
    grad_norm: float
    """2-norm of the synchronised gradient before clipping."""
    skipped: bool
    """Whether the gradient scaler of 16-mixed held the optimizer back."""
    stop: bool
    """Whether a rank was asked to stop; every rank knows it in the same step."""


class MicroBatches:
    """Gives parameters the gradient of a global batch, in forward passes of so many rows.

    Args:
        module: The classifier.
        size: Largest number of rows per forward pass, or None.
    """

    of_mean = True
    """Whether a pass back-propagates its part of the mean, times the ranks, or of the sum."""

    def __init__(self, module: Classifier, size: int | None) -> None:
        self.module = module
        self.size = size

    def __call__(self, batch: Batch) -> Accumulated:
        """Forward and backward for this rank's slice; every rank must call it."""
        module, criterion = self.module, self.module.criterion
        pending = self._mass(batch)
        parts, parameters = self._parts(batch), self._parameters
        total = torch.zeros((), dtype=module.loss_dtype, device=batch.target.device)
        kept = []
        for number, (images, target, index) in enumerate(parts, start=1):
            last = number == len(parts)
            # Gradients travel once per step: with the last micro-batch.
            with (
                contextlib.nullcontext() if last else self._gradients_stay(),
                module.row_keys.bound_to(index, batch.epoch),
            ):
                outputs = module.outputs(images)  # [n, C, H, W] -> [n, K]
                part = criterion(outputs, target)
                kept.append(outputs.detached())
                total = total + part.total.detach()
                if number == 1:
                    mass = pending.wait()
                loss = reduction.rank_loss(part.total, mass)
                if last:
                    # The log and the guard need the global loss.
                    numbers = torch.stack([total, interruption.wish(total)])
                    loss = module.gradient_sums.start(loss, numbers, parameters)
                module.manual_backward(loss)
        for parameter in parameters:
            if parameter.grad is None:
                # As on several ranks, where another's rows may depend on it.
                parameter.grad = torch.zeros_like(parameter)
        return Accumulated(module.gradient_sums.finish(), mass, joined(kept), batch.target)

    def _mass(self, batch: Batch) -> collectives.PendingSum:
        """Mass of the global batch; where each row counts 1, no rank needs another to know it."""
        criterion, dtype = self.module.criterion, self.module.loss_dtype
        if batch.rows and criterion.expected is False and not criterion.is_weighted:
            known = torch.full((), batch.rows, dtype=dtype, device=batch.target.device)
            return collectives.PendingSum(known, None)
        return collectives.start_sum(criterion.mass(batch.target, dtype))

    def _parts(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images, targets and positions of each micro-batch, as many as on every rank."""
        rows, world_size = len(batch.target), collectives.world_size()
        size = self.size or max(rows, 1)
        # A network may talk to other ranks in its passes, as synchronised batch norm does.
        longest = max(rows, math.ceil(batch.rows / world_size)) if self.size else rows
        cuts = [slice(first, first + size) for first in range(0, max(longest, 1), size)]
        return [(batch.images[cut], batch.target[cut], batch.index[cut]) for cut in cuts]

    @property
    def _parameters(self) -> list[nn.Parameter]:
        # The optimizer's list takes a tenth of the time of a walk through the network.
        groups = self.module.the_optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _gradients_stay(self) -> contextlib.AbstractContextManager[None]:
        strategy = self.module.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()


class GlobalStep:
    """Takes optimizer steps for a classifier.

    Args:
        module: The classifier; its criterion, optimizer and trainer are used.
        accumulate: Gives the parameters the gradient of a global batch.
        clip_norm: Largest 2-norm of the gradient, or None.
    """

    def __init__(
        self,
        module: Classifier,
        accumulate: MicroBatches | Shards,
        clip_norm: float | None,
    ) -> None:
        self.module = module
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.accumulated: Accumulated | None = None
        """Of the step under way, from its backward pass to the optimizer's own step."""
        self.before_update: Callable[[], None] | None = None
        """Called when the gradients are as the optimizer will read them."""
        self._outcome: StepOutcome | None = None

    def take(self, batch: Batch) -> StepOutcome:
        """Forward, backward and optimizer step for this rank's slice of a global batch.

        Every rank must call it, with an empty slice too.

        Raises:
            NonFiniteError: on every rank, before the optimizer changes a weight, if the loss or
                the gradient is not finite.
        """
        optimizer = self.module.the_optimizer
        optimizer.zero_grad()
        self.accumulated = self.accumulate(batch)
        optimizer.step()  # calls guard()
        self.accumulated = None
        assert self._outcome is not None
        return self._outcome

    def guard(self, optimizer: Optimizer) -> None:
        """Clip the synchronised, unscaled gradient and refuse one that is not finite.

        Called between the backward pass and the optimizer's own step. It reads loss and norm on
        the host, the only wait for the device in a step. Both are the same on every rank.
        """
        assert self.accumulated is not None
        mass = self.accumulated.mass
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        total, asked = self.accumulated.sums.unbind()
        mean = reduction.mean(total, mass)
        values = torch.stack([mean.double(), norm.double(), mass.double(), asked.double()])
        loss, grad_norm, total_mass, stop = values.tolist()
        finite = math.isfinite(grad_norm)
        self._outcome = StepOutcome(loss, total_mass, grad_norm, not finite, stop > 0)
        if not (finite and math.isfinite(loss)):
            if self._scaler_will_skip() and math.isfinite(loss):
                return
            raise NonFiniteError(self._diagnosis(self.accumulated, self._outcome))
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)
        if self.before_update is not None:
            self.before_update()

    def _scaler_will_skip(self) -> bool:
        # float16 overflows in a healthy run: the scaler skips that step and lowers its scale.
        return getattr(self.module.trainer.precision_plugin, "scaler", None) is not None

    def _diagnosis(self, accumulated: Accumulated, outcome: StepOutcome) -> str:
        """Say where the number was lost; every rank enters, since every rank saw the norm."""
        criterion, outputs = self.module.criterion, accumulated.outputs
        rows = outputs.rows.requires_grad_()
        with torch.enable_grad():
            losses = criterion.per_sample(outputs, accumulated.target)
            (gradient,) = torch.autograd.grad(losses.sum(), rows)
        bad = ~(losses.isfinite() & gradient.isfinite().all(-1))  # [n]
        empty = rows.new_zeros(()).double()
        mine = torch.stack(
            [
                bad.sum().double(),
                rows.detach().min().double() if len(rows) else empty,
                rows.detach().max().double() if len(rows) else empty,
            ]
        )
        ranks = collectives.gather_rows(mine.unsqueeze(0)).tolist()  # [W, 3]
        where = [
            f"rank {rank}: {int(count)} rows, {outputs.name} from {low:.4g} to {high:.4g}"
            for rank, (count, low, high) in enumerate(ranks)
            if count
        ] or [
            f"rank {rank}: no row of the loss itself, {outputs.name} from {low:.4g} to {high:.4g}"
            for rank, (_, low, high) in enumerate(ranks)
        ]
        return (
            f"step {self.module.global_step}: the loss ({outcome.loss:.6g}) or its gradient "
            f"(norm {outcome.grad_norm:.6g}) is not finite; {'; '.join(where)}. "
            f"{self._way_out(torch.promote_types(rows.dtype, torch.float32))} "
            "No weight was changed by this step."
        )

    def _way_out(self, dtype: torch.dtype) -> str:
        criterion = self.module.criterion
        domain = criterion.signature.domain(dtype)
        if math.isfinite(domain):
            return (
                f"{criterion.name} is sound up to a logit range of {domain:.1f} in "
                f"{str(dtype).removeprefix('torch.')}; loss=log_softmax_nll is the same function "
                "without that limit."
            )
        way_out = "Lower optimizer.lr or set optimizer.gradient_clip_norm."
        if criterion.name in registry.names():
            way_out += f" `equiloss verify {criterion.name}` tells whether the loss is at fault."
        return way_out
