"""The gradient that really trains, followed from the loss to the weights of every rank.

The formulations are compared on the logits of a step; what that step then does with them is held
against what it must be, at each station:

1. *logits*: what the backward pass brings to the logits, of every rank and micro-batch, against
   the oracle's gradient of the global mean (or, for another loss than cross-entropy, against one
   evaluation of it on the gathered batch).
2. *sum*: what each rank brings to a parameter, caught before it is reduced and added up in
   float64, against what the optimizer was given.
3. *row*: the first row of each rank, forwarded again alone on the first one with the weights of
   that moment, against what it was where it trained.
4. *ranks*: what learns after the step, parameters and buffers: the same bits on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equiloss.distributed import collectives
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Outputs
from equiloss.parity.oracle import Oracle
from equiloss.records.results import FOLLOWED, beyond_bound

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.classifier import Classifier
    from equiloss.training.step import StepOutcome

# Numbers that are looked at together.
BUCKET = 2**20


class Followed(NamedTuple):
    """What one step's gradient was found to be, the same on every rank."""

    gradient_ratio: float = 0.0
    """Largest error of a row's gradient at the logits over its bound."""
    sum_ratio: float = 0.0
    """Largest error of a parameter's gradient over what rounding in its sum explains."""
    row_ratio: float = 0.0
    """Largest difference of a row that was forwarded again over half of its digits."""
    ranks_differ: float = 0.0
    """Parameters that learn, and buffers, that are not the same bits on every rank."""

    def disagreeing(self) -> list[str]:
        """What is beyond its bound, in words, with its figure."""
        figures = self._asdict()
        units = dict.fromkeys(figures, "times its bound") | {"ranks_differ": "tensors"}
        beyond = beyond_bound(figures)
        return [f"{FOLLOWED[name]} ({figures[name]:.3g} {units[name]})" for name in beyond]

    def worst(self, other: Followed) -> Followed:
        """The larger of each figure."""
        return Followed(*map(max, self, other))


class Watch:
    """Watches one training step of a classifier; every rank must have one for the same step.

    Args:
        module: The classifier.
        batch: This rank's part of the global batch, as the step is given it.
    """

    def __init__(self, module: Classifier, batch: Batch) -> None:
        self.module = module
        self.batch = batch
        self.row_ratio = 0.0
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        # What half precision multiplies the loss with, in this step.
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._arrived: list[Tensor] = []
        groups = module.the_optimizer.param_groups  # with what is frozen until a later epoch
        learning = [p for group in groups for p in group["params"] if p.requires_grad]
        self._brought: dict[nn.Parameter, list[Tensor]] = {p: [] for p in learning}
        self._given: dict[nn.Parameter, Tensor] = {}
        module.step.before_update = self._note_given
        self._hooks: list[Any] = [module.criterion.register_forward_pre_hook(self._see)]
        for parameter, parts in self._brought.items():
            hook = parameter.register_hook(partial(_keep, parts))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
            # Before any other: what they make of the gradient is no rank's own.
            hooks: Any = parameter._backward_hooks
            others = [each for each in hooks.items() if each[0] != hook.id]
            for number, function in others:
                del hooks[number]
                hooks[number] = function

    def _see(self, _: nn.Module, inputs: tuple[Outputs, Tensor]) -> None:
        """Catch the gradient of the outputs of a forward pass."""
        rows, place = inputs[0].rows, len(self._arrived)
        self._arrived.append(torch.zeros_like(rows))
        if rows.requires_grad:
            keep = partial(self._arrived.__setitem__, place)
            self._hooks.append(rows.register_hook(keep))  # type: ignore[no-untyped-call]

    def _note_given(self) -> None:
        self._given = {p: p.grad.clone() for p in self._brought if p.grad is not None}

    def close(self) -> None:
        """Watch no longer."""
        self.module.step.before_update = None
        for hook in self._hooks:
            hook.remove()

    def forward_again(self, outputs: Outputs) -> None:
        """Compare the first row of each rank with itself alone, before the weights change."""
        batch = self.batch
        images, index, rows = (
            collectives.gather_rows(part[:1].detach())
            for part in (batch.images, batch.index, outputs.rows)
        )
        if collectives.rank() > 0 or not len(rows):
            return
        module = self.module
        buffers = [(buffer, buffer.clone()) for buffer in module.model.buffers()]
        alone = []
        # Another number of rows would be compiled anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for row in range(len(index)):
                with module.row_keys.bound_to(index[row : row + 1], batch.epoch):
                    alone.append(module.outputs(images[row : row + 1]).rows)
            for buffer, before in buffers:
                buffer.copy_(before)
        # A few rows: on the host, where an operation on them takes a tenth as long.
        again, before = torch.stack([torch.cat(alone), rows]).double().cpu().numpy()
        scale = abs(before).max(-1).clip(min=1) * torch.finfo(rows.dtype).eps ** 0.5
        with np.errstate(invalid="ignore"):  # infinity less infinity
            ratio = float((abs(again - before).max(-1) / scale).max())
        self.row_ratio = math.inf if math.isnan(ratio) else ratio

    def follow(
        self, outputs: Outputs, target: Tensor, criterion: Criterion, exact: Oracle, *, known: bool
    ) -> Tensor:
        """Ratio of the gradient that arrived at the logits to its bound, of this rank, 0-dim.

        Args:
            outputs: The network's outputs for this rank's rows.
            target: This rank's targets.
            criterion: The loss that trains.
            exact: The oracle's values for these rows.
            known: Whether that loss is the oracle's function.
        """
        mass = collectives.sum_over_ranks(exact.mass).item()
        factor = 1.0
        if self.module.step.accumulate.of_mean:
            factor = collectives.world_size() / mass if mass > 0 else 0.0
        arrived = torch.cat(self._arrived).double() / self._scale
        wide = torch.promote_types(outputs.rows.dtype, torch.float32)
        eps = torch.finfo(wide).eps
        if known:
            expected, bound = exact.gradient, exact.bound
        else:
            expected, largest = _gathered(outputs, target, criterion)
            # Its terms may cancel in a row; but a sum of rows rounds as the largest of them does.
            terms = torch.zeros_like(exact.spread) + largest
            for weight in outputs.head().values():
                if weight.dim() == 2:  # features get a sum over classes, whose terms may cancel
                    terms = terms + (exact.gradient.abs() @ weight.abs().double()).amax(-1)
            # Sums over the row's numbers or classes round once for each of them.
            numbers = max(outputs.rows.shape[1], exact.gradient.shape[1])
            bound = eps * numbers * (1 + exact.spread) * terms
        # The mass, the quotient and the product; weights are added up row by row.
        weighted = (len(target) + collectives.world_size()) * criterion.is_weighted
        rounded = (4 + weighted) * eps
        if outputs.rows.dtype != wide:
            rounded += torch.finfo(outputs.rows.dtype).eps
        bound = (bound + rounded * expected.abs().amax(-1)) * factor
        error = arrived.sub_(expected, alpha=factor).abs_().amax(-1)
        fine = (error == 0) | (exact.spread > criterion.signature.domain(wide))
        return peak((error / bound).masked_fill_(fine, 0))

    def conclude(self, gradient_ratio: Tensor, outcome: StepOutcome) -> Followed:
        """The verdict on the step, once the optimizer has taken it.

        Args:
            gradient_ratio: Of this rank.
            outcome: What the step itself says of it.
        """
        ratios = [gradient_ratio, torch.full_like(gradient_ratio, self.row_ratio)]
        ratios += [] if outcome.skipped else self._sums(outcome)
        gradient, row, *sums = collectives.max_over_ranks(torch.stack(ratios)).tolist()
        return Followed(gradient, max(sums, default=0.0), row, self._ranks_differ())

    def _sums(self, outcome: StepOutcome) -> Iterator[Tensor]:
        """Error of each bucket of parameters over its bound."""
        world_size, step = collectives.world_size(), self.module.step
        divisor = world_size if step.accumulate.of_mean else outcome.mass
        factor = _clipped_by(step.clip_norm, outcome.grad_norm) / divisor if divisor else 0.0
        if world_size == 1 and factor == self._scale == 1 and self._is_given_as_brought():
            return  # to the bit: there is nothing to add up
        for parameters in buckets(list(self._brought)):
            parts = [self._brought[parameter] for parameter in parameters]
            eps = torch.finfo(parameters[0].dtype).eps
            given = _flat([self._given.get(p) for p in parameters], parameters)
            brought = given.new_zeros((2, len(given)))
            passes = list(zip_longest(*parts))
            for gradients in passes:
                flat = _flat(gradients, parameters)
                brought[0] += flat
                brought[1] += flat.abs_()
            total, size = collectives.sum_over_ranks(brought).mul_(factor / self._scale)
            # Each addition over ranks and passes rounds, and so do mean, scale and clipping.
            bound = size.mul_((world_size + len(passes) + 4) * eps)
            error = given.sub_(total).abs_()
            yield peak(torch.where(error == 0, 0, error.div_(bound)))

    def _is_given_as_brought(self) -> bool:
        """Whether the optimizer was given the very bits that one pass has brought."""
        return all(
            len(parts) <= 1
            and parameter in self._given
            and torch.equal(self._given[parameter], *parts or (torch.zeros_like(parameter),))
            for parameter, parts in self._brought.items()
        )

    def _ranks_differ(self) -> float:
        if collectives.world_size() == 1:
            return 0.0
        model, criterion = self.module.model, self.module.criterion
        parameters = [*model.parameters(), *criterion.parameters()]
        tensors = [*(p for p in parameters if p.requires_grad), *model.buffers()]
        digests = torch.stack([digest(tensor.detach()) for tensor in tensors])
        largest, smallest = collectives.max_over_ranks(torch.stack([digests, ~digests]))
        return float((largest != ~smallest).any(-1).sum())


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype together, as long as they are no more numbers than a bucket has.

    >>> sizes = [3, 2**20, 5]
    >>> [len(each) for each in buckets([nn.Parameter(torch.zeros(size)) for size in sizes])]
    [1, 1, 1]
    """
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(each.numel() for each in bucket) + parameter.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def digest(tensor: Tensor) -> Tensor:
    """Two sums modulo 2**64 over a tensor's bits [2] int64, one of them by position.

    >>> torch.equal(digest(torch.tensor([0.0, 1.0])), digest(torch.tensor([-0.0, 1.0])))
    False
    """
    pattern = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    bits = tensor.contiguous().view(pattern[tensor.element_size()]).flatten().to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return torch.stack([bits.sum(), (bits * places).sum()])


def peak(values: Tensor) -> Tensor:
    """Largest value along the last dimension, 0 where it has none; NaN counts as infinite."""
    values = torch.nan_to_num(values, nan=math.inf, posinf=math.inf)
    return torch.cat([values, values.new_zeros((*values.shape[:-1], 1))], dim=-1).amax(-1)


def _keep(parts: list[Tensor], gradient: Tensor | None) -> None:
    if gradient is not None:
        parts.append(gradient.detach().clone())


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """The gradients of some parameters, one after the other, float64; None counts as 0."""
    pairs = zip(gradients, parameters, strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]
    return torch.cat(flat).double()


def _clipped_by(clip_norm: float | None, norm: float) -> float:
    """What torch multiplies gradients with, which it clips to a norm."""
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))


def _gathered(outputs: Outputs, target: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Gradient of one evaluation on the rows of all ranks: this rank's, and the largest number."""
    counts = torch.zeros(collectives.world_size(), dtype=torch.int64, device=target.device)
    counts[collectives.rank()] = len(target)
    first = int(collectives.sum_over_ranks(counts)[: collectives.rank()].sum())
    rows = collectives.gather_rows(outputs.rows).detach().requires_grad_()
    with torch.enable_grad():
        losses = criterion.per_sample(outputs.with_rows(rows), collectives.gather_rows(target))
        (gradient,) = torch.autograd.grad(losses.sum(), rows)
    return gradient[first : first + len(target)].double(), gradient.abs().amax()
