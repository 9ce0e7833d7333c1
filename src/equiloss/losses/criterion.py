"""From (logits, target) to (total, mass): a loss with its options, before any reduction.

    loss of a batch = total / mass

`total` is the sum of the per-sample losses and `mass` the denominator that
`torch.nn.functional.cross_entropy(reduction="mean")` divides by. Both are sums over rows, so
they add up over micro-batches and ranks; `equiloss.losses.reduction` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equiloss.errors import LossError
from equiloss.imports import import_target
from equiloss.losses import registry
from equiloss.losses.adapter import adapted
from equiloss.losses.options import check_counts, checked, class_weights
from equiloss.losses.projection import Logits, Outputs
from equiloss.losses.signature import HEAD_BIAS, HEAD_WEIGHT, LossFunction, read
from equiloss.losses.validation import validate_targets


class LossSum(NamedTuple):
    """Two sums over rows whose ratio is the loss."""

    total: Tensor
    """Sum of per-sample losses, 0-dim, in nats; carries the gradient."""
    mass: Tensor
    """Denominator of the mean, 0-dim, in units of rows or of class weight."""


class Criterion(nn.Module):
    """A registered loss with its options.

    Args:
        name: A registered name, the loss itself, or `custom` with
            `target="package.module:function"`.
        class_counts: Rows of each class in the training set [C]; needed by `weight="balanced"`
            and by losses that take class counts.
        **options: The loss's options. `weight` is None, `"balanced"` or one number per class.

    Raises:
        LossError: for an unknown loss or option, a value out of its range, a capability that the
            loss lacks, or a loss that does not return one value per row.
        DataError: (when called) for targets that are no targets, naming the row.

    >>> criterion = Criterion("cross_entropy", weight=[1.0, 3.0])
    >>> loss = criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
    >>> loss.mass.item(), round((loss.total / loss.mass).item(), 4)
    (4.0, 0.6931)
    """

    def __init__(
        self,
        name: str | LossFunction,
        *,
        class_counts: Sequence[int] | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(name, str):
            called = getattr(name, "__name__", type(name).__name__)
            loss, name = adapted(called, name), called
        elif name == "custom":
            target = options.pop("target", None)
            loss = adapted(name, import_target(str(target), "loss.target", LossError))
            options = dict(options.pop("options", None) or {}) | options
        else:
            loss = registry.get(name)
        self.name = name
        self.signature = read(name, loss)
        options = checked(name, self.signature, options)
        counts = None if class_counts is None else torch.as_tensor(class_counts).cpu()
        if "class_counts" in self.signature.supported:
            if counts is None:
                raise LossError(
                    f"loss {name!r} needs class_counts, the rows of each training class"
                )
            check_counts(name, counts, self.signature.min_class_count)

        weight = options.pop("weight", None)
        self.ignore_index: int | None = options.pop("ignore_index", self._default("ignore_index"))
        smoothing = options.pop("label_smoothing", self._default("label_smoothing"))
        self.label_smoothing = float(smoothing or 0.0)
        # Not buffers: these follow the logits' dtype, not the module's (bf16-true would round
        # class weights), and DDP would broadcast a buffer before every forward pass.
        self._vectors: dict[str, Tensor] = {}
        if weight is not None:
            self._vectors["weight"] = class_weights(name, weight, counts)
        if "class_counts" in self.signature.supported and counts is not None:
            self._vectors["class_counts"] = counts
        self._placed: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.expected: bool | None = None

        self.loss: LossFunction
        if isinstance(loss, type):
            self.loss, self._keywords = loss(**options), {}
        else:
            self.loss, self._keywords = loss, dict(options)
        if "label_smoothing" in self.signature.supported:
            self._keywords["label_smoothing"] = self.label_smoothing

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, as plain Python data."""
        weight = self._vectors.get("weight")
        values: dict[str, Any] = {
            **self._keywords,
            "weight": None if weight is None else weight.tolist(),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }
        return {key: values[key] for key in self.signature.options if key in values}

    def forward(self, logits: Tensor | Outputs, target: Tensor) -> LossSum:
        """Sum of the losses of a batch, and its mass.

        Args:
            logits: Unnormalised scores [N, C], or what they are made from for a loss that wants
                features; half precision is promoted to float32.
            target: Classes [N] int64, or probabilities [N, C] where the loss takes them.

        Returns:
            0-dim `total` (nats) and `mass`, in the promoted dtype.
        """
        losses, ignored = self._evaluate(logits, target)  # [N], [N] or None
        if ignored is None and not self.is_weighted:
            return LossSum(losses.sum(), losses.new_full((), len(target)))
        return LossSum(losses.sum(), self.mass(target, losses.dtype))

    def per_sample(self, logits: Tensor | Outputs, target: Tensor) -> Tensor:
        """Loss of each row [N], in nats; ignored rows are exactly 0, in value and gradient."""
        return self._evaluate(logits, target)[0]

    def _evaluate(self, logits: Tensor | Outputs, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of each row [N], and which are ignored [N], or None where none can be."""
        outputs = logits if isinstance(logits, Outputs) else Logits(logits)
        self._check_shapes(outputs, target)
        ignored = self._ignored(target, outputs.classes)
        kind = outputs.rows.device.type
        if torch.is_autocast_enabled(kind):
            # It would take log and softmax to bfloat16 on a CPU and to float32 on CUDA.
            with torch.autocast(kind, enabled=False):
                losses = self._promoted(outputs, target, ignored)
        else:
            losses = self._promoted(outputs, target, ignored)
        if ignored is not None:
            # A loss may make something of equal logits all the same.
            losses = losses.masked_fill(ignored, 0)
        return losses, ignored

    def _promoted(self, outputs: Outputs, target: Tensor, ignored: Tensor | None) -> Tensor:
        rows = outputs.rows  # [N, C], or [N, D] where the loss takes features
        dtype = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(dtype)
        if ignored is not None:
            # Equal logits are harmless in every loss; NaN · 0 would not be.
            rows = rows.masked_fill(ignored.unsqueeze(-1), 0)
        keywords = dict(self._keywords)
        for key in self._vectors:
            keywords[key] = self._vector(key, dtype, rows.device)
        if target.is_floating_point():
            target = target.to(dtype)
        elif self.ignore_index is not None:
            keywords["ignore_index"] = self.ignore_index
        head = {name: part.to(dtype) for name, part in outputs.head().items()}
        weight = [head.pop(HEAD_WEIGHT)] if HEAD_WEIGHT in head else []
        losses: Tensor = self.loss(rows, *weight, target, **head, **keywords)
        self._check_result(losses, rows)
        return losses

    def expect(self, *, ignored_rows: bool | None) -> None:
        """Say what all targets were seen to be, so that no batch of them is looked at again.

        Args:
            ignored_rows: Whether some are `ignore_index`; the others are classes. None: not known.
        """
        self.expected = ignored_rows

    def _ignored(self, target: Tensor, classes: int) -> Tensor | None:
        """Rows whose target is `ignore_index` [N], or None where no row can have it.

        Targets on the host are checked on the way, unless it is known what they are. On another
        device a look at the values would wait for it, and compiled code looks at none.
        """
        looks = target.device.type == "cpu" and not torch.compiler.is_compiling()
        if target.is_floating_point():
            if looks and self.expected is None:
                validate_targets(target, classes)
            return None
        none = self.expected is False
        if looks and self.expected is None and len(target):
            if target.dtype != torch.int64 or target.dim() != 1:
                validate_targets(target, classes)
            low, high = map(int, target.aminmax())
            if low < 0 or high >= classes:
                validate_targets(target, classes, self.ignore_index)
            none = self.ignore_index is None or not low <= self.ignore_index <= high
        return None if none or self.ignore_index is None else target == self.ignore_index

    def exact_sum(self, logits: Tensor | Outputs, target: Tensor) -> LossSum:
        """As calling it does, with both sums in float64: what rows are is promoted as ever.

        So the sums of many batches [N, C], [N] add up without a rounding of their own.
        """
        losses = self.per_sample(logits, target)  # [N]
        masses = self._masses(target, losses.dtype)
        return LossSum(losses.double().sum(), masses.double().sum())

    def mass(self, target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Denominator of the mean over these rows, 0-dim in `dtype`; needs no logits.

        Rows of soft targets count 1 each, as PyTorch defines it. Rows of integer targets count
        their class's weight (1 without weights), ignored ones 0.
        """
        return self._masses(target, dtype).sum(dtype=dtype)

    def _masses(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """What each row counts [N]: whole numbers, or weights in `dtype`."""
        if target.is_floating_point():
            return target.new_ones(len(target))
        kept = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            kept = target != self.ignore_index
        if not self.is_weighted:
            return kept
        weight = self._vector("weight", dtype, target.device)
        return weight[target.masked_fill(~kept, 0)] * kept

    def check_classes(self, num_classes: int) -> None:
        """Refuse options that have another number of classes than the data.

        Raises:
            LossError: naming the option and both numbers.
        """
        for key, vector in self._vectors.items():
            if len(vector) != num_classes:
                raise LossError(
                    f"loss.{key} has {len(vector)} values for {num_classes} classes: "
                    "give one per class"
                )

    @property
    def is_weighted(self) -> bool:
        """Whether rows count by class weights."""
        return "weight" in self._vectors

    def weight(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Class weights [C], or None without weights."""
        return self._vector("weight", dtype, device) if self.is_weighted else None

    def _vector(self, key: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        place = (key, dtype, device)
        if place not in self._placed:
            self._placed[place] = self._vectors[key].to(device, dtype)
        return self._placed[place]

    def _default(self, key: str) -> Any:
        option = self.signature.options.get(key)
        return None if option is None else option.default

    def _check_shapes(self, outputs: Outputs, target: Tensor) -> None:
        wants = "features" if self.signature.wants_features else "logits"
        if outputs.name != wants:
            more = " and a head" if self.signature.wants_features else ""
            raise LossError(f"loss {self.name!r} takes {wants}{more}, and was given the other")
        head = outputs.head()
        if HEAD_BIAS in head and not self.signature.takes_head_bias:
            raise LossError(
                f"loss {self.name!r} takes no {HEAD_BIAS}, and the network's head has a bias"
            )
        shape = (*outputs.rows.shape[:-1], outputs.classes)
        if len(shape) != 2 or target.shape not in (shape[:1], shape):
            raise LossError(
                "logits must be [N, C] and targets [N] or [N, C]; got "
                f"{list(shape)} and {list(target.shape)}"
            )
        self.check_classes(outputs.classes)
        if target.is_floating_point() and not self.signature.soft_targets:
            raise LossError(
                f"loss {self.name!r} takes classes [N], not probabilities [N, C]: use a loss with "
                "soft_targets, such as cross_entropy"
            )

    def _check_result(self, losses: Any, rows: Tensor) -> None:
        if not isinstance(losses, Tensor) or losses.shape != rows.shape[:1]:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise LossError(
                f"loss {self.name!r} returned {got} for {rows.shape[0]} rows: a loss returns "
                "one value per row [N] and never reduces"
            )
        if rows.requires_grad and not losses.requires_grad and torch.is_grad_enabled():
            raise LossError(
                f"loss {self.name!r} returned a result without gradient: it must not detach"
            )
