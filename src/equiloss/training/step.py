"""One optimizer step on a global batch: mass, micro-batches, clipping, guard.

The mass of the whole global batch (all ranks, all micro-batches) is known before the first
backward pass, so that each micro-batch contributes exactly its part of

    loss = sum of per-sample losses / mass

and the result does not depend on how the batch was split. It needs the targets alone, so its
sum over ranks travels while the network runs.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from equiloss.distributed import collectives
from equiloss.errors import NonFiniteError
from equiloss.losses import reduction, registry
from equiloss.losses.projection import Projection

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.classifier import Classifier


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
    outputs: Tensor | Projection | None
    """This rank's logits [n, K], or what they are made from as this step saw it; detached.

    None where there are only features and nobody asked to keep them."""
    target: Tensor
    """This rank's targets [n] or [n, K]."""


class GlobalStep:
    """Takes optimizer steps for a classifier.

    Args:
        module: The classifier; its criterion, optimizer and trainer are used.
        micro_batch_size: Largest number of rows per forward pass, or None.
        clip_norm: Largest 2-norm of the gradient, or None.
    """

    def __init__(
        self, module: Classifier, micro_batch_size: int | None, clip_norm: float | None
    ) -> None:
        self.module = module
        self.micro_batch_size = micro_batch_size
        self.clip_norm = clip_norm
        self.keep_head = False
        """Whether the next outcome holds a copy of the head, for a loss that takes features."""
        self._parts: list[Tensor | Projection] = []
        self._target: Tensor
        self._total: collectives.PendingSum
        self._mass: Tensor
        self._seen = (math.nan, math.nan, math.nan)

    def check(self) -> None:
        """Refuse what such steps cannot keep their promise with; every rank must call it."""

    def take(self, batch: Batch) -> StepOutcome:
        """Forward, backward and optimizer step for this rank's slice of a global batch.

        Every rank must call it, with an empty slice too.

        Raises:
            NonFiniteError: on every rank, before the optimizer changes a weight, if the loss or
                the gradient is not finite.
        """
        optimizer = self.module.the_optimizer
        optimizer.zero_grad()
        self._parts, self._target = [], batch.target
        self._accumulate(batch)
        seen: Tensor | Projection | None = _joined(self._parts)
        if isinstance(seen, Projection):
            # The optimizer is about to change the head; a copy costs as much memory as it does.
            seen = seen.snapshot() if self.keep_head else None
        optimizer.step()  # calls guard()

        loss, grad_norm, mass = self._seen
        self._parts = []
        return StepOutcome(loss, mass, grad_norm, not math.isfinite(grad_norm), seen, batch.target)

    def _accumulate(self, batch: Batch) -> None:
        """Give the parameters their gradient, and the step the global batch's sums."""
        module, criterion = self.module, self.module.criterion
        pending = collectives.start_sum(criterion.mass(batch.target, module.loss_dtype))
        size = self.micro_batch_size or max(len(batch.target), 1)
        fields = (batch.images, batch.target, batch.index)
        parts = list(zip(*(torch.split(field, size) for field in fields), strict=True))
        total = torch.zeros((), dtype=module.loss_dtype, device=batch.target.device)
        for number, (images, target, index) in enumerate(parts, start=1):
            last = number == len(parts)
            # Gradients travel once per step: with the last micro-batch.
            with (
                contextlib.nullcontext() if last else self._gradients_stay(),
                module.rows.of(index, batch.epoch),
            ):
                outputs = module.outputs(images)  # [n, C, H, W] -> [n, K]
                part = criterion(outputs, target)
                self._keep(outputs)
                total = total + part.total.detach()
                if number == 1:
                    self._mass = pending.wait()
                if last:
                    # The log and the guard need the global loss: it travels during backward.
                    self._total = collectives.start_sum(total)
                module.manual_backward(reduction.rank_loss(part.total, self._mass))

    def _keep(self, outputs: Tensor | Projection) -> None:
        """Remember a part of the batch's outputs, without its graph."""
        if isinstance(outputs, Projection):
            self._parts.append(outputs._replace(features=outputs.features.detach()))
        else:
            self._parts.append(outputs.detach())

    def guard(self, optimizer: Optimizer) -> None:
        """Clip the synchronised, unscaled gradient and refuse one that is not finite.

        Called between the backward pass and the optimizer's own step. It reads loss and norm on
        the host, the only wait for the device in a step. Both are the same on every rank.
        """
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = reduction.mean(self._total.wait(), self._mass)
        values = torch.stack([loss.double(), norm.double(), self._mass.double()]).tolist()
        self._seen = (values[0], values[1], values[2])
        if not all(map(math.isfinite, self._seen[:2])):
            if self._scaler_will_skip() and math.isfinite(self._seen[0]):
                return
            raise NonFiniteError(self._diagnosis())
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)

    def _gradients_stay(self) -> contextlib.AbstractContextManager[None]:
        strategy = self.module.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    def _scaler_will_skip(self) -> bool:
        # float16 overflows in a healthy run: the scaler skips that step and lowers its scale.
        return getattr(self.module.trainer.precision_plugin, "scaler", None) is not None

    def _diagnosis(self) -> str:
        """Say where the number was lost; every rank enters, since every rank saw the norm."""
        module, criterion = self.module, self.module.criterion
        outputs = _joined(self._parts)
        # Logits [n, K]; of a loss that takes features those [n, D].
        rows = outputs.features if isinstance(outputs, Projection) else outputs
        rows.requires_grad_()
        with torch.enable_grad():
            losses = criterion.per_sample(outputs, self._target)
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
        loss, norm, _ = self._seen
        what = "features" if isinstance(outputs, Projection) else "logits"
        where = [
            f"rank {rank}: {int(count)} rows, {what} from {low:.4g} to {high:.4g}"
            for rank, (count, low, high) in enumerate(ranks)
            if count
        ] or [
            f"rank {rank}: no row of the loss itself, {what} from {low:.4g} to {high:.4g}"
            for rank, (_, low, high) in enumerate(ranks)
        ]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        domain = criterion.signature.domain(dtype)
        if math.isfinite(domain):
            way_out = (
                f"{criterion.name} is sound up to a logit range of {domain:.1f} in "
                f"{str(dtype).removeprefix('torch.')}; loss=log_softmax_nll is the same function "
                "without that limit."
            )
        else:
            way_out = "Lower optimizer.lr or set optimizer.gradient_clip_norm."
            if criterion.name in registry.names():
                way_out += (
                    f" `equiloss verify {criterion.name}` tells whether the loss is at fault."
                )
        return (
            f"step {module.step_index}: the loss ({loss:.6g}) or its gradient (norm {norm:.6g}) "
            f"is not finite; {'; '.join(where)}. {way_out} "
            "No weight was changed by this step."
        )


def _joined(parts: list[Tensor | Projection]) -> Tensor | Projection:
    """The outputs of all micro-batches: [n_1, …], [n_2, …] -> [n, …]."""
    first = parts[0]
    if isinstance(first, Projection):
        features = [part.features for part in parts if isinstance(part, Projection)]
        return first._replace(features=torch.cat(features))
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
