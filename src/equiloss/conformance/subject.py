"""The loss that is held against the laws, called as a run calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equiloss.conformance.case import Case, Evaluation, batch, class_weights, soft
from equiloss.errors import LossError, unknown
from equiloss.imports import foreign_code
from equiloss.losses.adapter import adapted
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Logits, Outputs, Projection
from equiloss.losses.signature import HEAD_BIAS, HEAD_WEIGHT, RESERVED, LossFunction, read

# The target of ignored rows, where neither a case nor the loss has another.
IGNORED = -100


class LossRaised(Exception):  # noqa: N818 - the error is the loss's own, its cause
    """The loss raised an exception where it should have given a result."""

    def __init__(self, error: BaseException) -> None:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else ''}")


@contextmanager
def errors_of_the_loss() -> Iterator[None]:
    """Turn what the loss raises into `LossRaised`."""
    try:
        with foreign_code():
            yield
    except Exception as error:
        raise LossRaised(error) from error


def evaluate_function(loss: Callable[[Tensor, Tensor], Tensor], case: Case) -> Evaluation:
    """Evaluate a function (logits, target) -> [N] and its gradient, on copies of the tensors."""
    logits = case.logits.clone().requires_grad_()
    losses = loss(logits, case.target.clone())
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return Evaluation(losses.detach(), gradient)


class Subject:
    """A loss with values for its own options.

    Args:
        name: What it is called.
        loss: The function, or the nn.Module class.
        registered: Whether it is registered by that name.
        options: Values of its own options; `weight` and the other reserved keywords are the
            laws' to vary.

    Raises:
        LossError: if it is no loss by its signature, or for an option that it does not have.
    """

    def __init__(
        self, name: str, loss: LossFunction, options: Mapping[str, Any], *, registered: bool
    ) -> None:
        self.name = name
        self.source = loss
        """As it was given, and as another process would import it."""
        self.loss = adapted(name, loss)
        self.registered = registered
        self.signature = read(name, self.loss)
        self.options = dict(options)
        self._criteria: dict[tuple[Any, ...], Criterion] = {}

    def check_options(self) -> None:
        """Refuse options that the loss does not have, or that the laws vary themselves.

        Raises:
            LossError: naming the option and the choices.
        """
        own_options = [key for key in self.signature.options if key not in RESERVED]
        for key in self.options:
            if key in RESERVED:
                raise LossError(
                    f"loss {self.name!r} is verified with every {key}: give its own options alone"
                )
            if key not in own_options:
                raise LossError(unknown(f"option of loss {self.name!r}", key, own_options))

    @property
    def is_module(self) -> bool:
        """Whether the loss is a class, made anew for each criterion."""
        return isinstance(self.loss, type)

    @property
    def fixed_classes(self) -> int | None:
        """The only number of classes it takes: its option `num_classes`, if it has one."""
        number = self.options.get("num_classes")
        if number is None:
            number = self._default("num_classes")
        return number if isinstance(number, int) else None

    def _default(self, key: str) -> Any:
        """Default of an option; None if the loss does not have the option."""
        option = self.signature.options.get(key)
        return None if option is None else option.default

    def supports(self, keyword: str) -> bool:
        """Whether it takes this reserved keyword."""
        return keyword in self.signature.supported

    def batch(self, rows: int, classes: int, **numbers: Any) -> Case:
        """Make a case as `case.batch` does, with the classes that the loss takes, in its domain."""
        case = batch(rows, self.fixed_classes or classes, **numbers)
        # logsumexp(x) - min(x) <= max(x) - min(x) + log(C); a percent off the edge.
        room = 0.99 * (self.signature.domain(case.logits.dtype) - math.log(case.classes))
        if rows and 0 < room < math.inf:
            width = case.logits.amax(-1) - case.logits.amin(-1)  # [N]
            factor = (room / width).clamp(max=1)  # inf for equal logits
            return replace(case, logits=case.logits * factor.unsqueeze(-1))
        return case

    def is_outside(self, case: Case) -> bool:
        """Whether a row has logsumexp(x) - min(x) beyond the loss's domain."""
        logits = case.logits.double()
        spread = logits.logsumexp(-1) - logits.amin(-1)
        return bool((spread > self.signature.domain(case.logits.dtype)).any())

    def with_options(self, **options: Any) -> Subject:
        """The same loss with other values of some options."""
        options = self.options | options
        return Subject(self.name, self.source, options, registered=self.registered)

    def combined(self, case: Case) -> Iterator[Case]:
        """The case with every option that the loss supports: hard targets, then soft ones."""
        if self.supports("weight"):
            case = replace(case, weight=class_weights(case.classes))
        if self.supports("label_smoothing"):
            case = replace(case, label_smoothing=0.25)
        yield self.with_ignored_rows(case) if self.supports("ignore_index") else case
        if self.signature.soft_targets:
            yield soft(case)

    def ignore_index(self, case: Case) -> int:
        """The target of a case's ignored rows."""
        if case.ignore_index is not None:
            return case.ignore_index
        default = self._default("ignore_index")
        return default if isinstance(default, int) else IGNORED

    def with_ignored_rows(self, case: Case) -> Case:
        """The case with every third row ignored, from the second on."""
        ignored = self.ignore_index(case)
        # An ignored class is no target of a row that counts.
        target = torch.where(case.target == ignored, (ignored + 1) % case.classes, case.target)
        target[1::3] = ignored
        return replace(case, target=target)

    def criterion(self, case: Case) -> Criterion:
        """The criterion that a run with the case's options has; made once for equal options.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        classes = case.classes if self.supports("class_counts") or case.weight else None
        double = case.logits.dtype == torch.float64
        key = (classes, case.weight, case.label_smoothing, case.ignore_index, double)
        if key not in self._criteria:
            self._criteria[key] = self.new_criterion(case)
        return self._criteria[key]

    def new_criterion(self, case: Case, seed: int = 0) -> Criterion:
        """Make a criterion with the case's options; `seed` is that of random parameters.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        options = self.options | case.options()
        if self.supports("label_smoothing"):
            # Also where the default is another.
            options["label_smoothing"] = case.label_smoothing
        if self.supports("class_counts"):
            options["class_counts"] = class_counts(case.classes)
        with torch.random.fork_rng(devices=[]), errors_of_the_loss():
            torch.manual_seed(seed)
            criterion = Criterion(self.loss, **options)
        # As a run does with `trainer.precision=64-true`.
        return criterion.double() if case.logits.dtype == torch.float64 else criterion

    def outputs(self, logits: Tensor) -> Outputs:
        """A network's outputs: logits, or features and a head that give the same logits."""
        if not self.signature.wants_features:
            return Logits(logits)
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
        bias = eye.new_zeros(len(eye)) if self.signature.takes_head_bias else None
        return Projection(logits, eye, bias)

    def losses(self, case: Case) -> Tensor:
        """Evaluate the loss of each row [N], without a gradient.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        loss = self.per_sample(case)
        with torch.no_grad(), errors_of_the_loss():
            return loss(case.logits.clone(), case.target.clone())

    def evaluate(self, case: Case) -> Evaluation:
        """Evaluate the loss of each row [N], and the gradient of their sum in the logits [N, C].

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        loss = self.per_sample(case)
        with errors_of_the_loss():
            return evaluate_function(loss, case)

    def per_sample(self, case: Case) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss as (logits, target) -> [N], through its `criterion`.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        criterion = self.criterion(case)
        return lambda logits, target: criterion.per_sample(self.outputs(logits), target)

    def function(self, case: Case) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss as (logits, target) -> [N], without the criterion, with its `keywords` bound."""
        loss, keywords = self.criterion(case).loss, self.keywords(case)
        # One positional argument, if the loss takes a head.
        head = [self.leading_arguments(case)[HEAD_WEIGHT]] if self.signature.wants_features else []
        return lambda rows, target, **more: loss(rows, *head, target, **keywords, **more)

    def leading_arguments(self, case: Case) -> dict[str, Tensor]:
        """The positional arguments of the loss by name: logits, or features and head; target."""
        outputs = self.outputs(case.logits)
        head = outputs.head()
        head.pop(HEAD_BIAS, None)  # one of the keywords
        return {outputs.name: outputs.rows, **head, "target": case.target}

    def keywords(self, case: Case) -> dict[str, Any]:
        """The keyword arguments that the criterion gives to the loss."""
        dtype = case.logits.dtype
        keywords: dict[str, Any] = {} if self.is_module else dict(self.options)
        if self.supports("label_smoothing"):
            keywords["label_smoothing"] = case.label_smoothing
        if self.supports("ignore_index") and not case.soft:
            keywords["ignore_index"] = self.ignore_index(case)
        if case.weight is not None:
            keywords["weight"] = torch.tensor(case.weight, dtype=dtype)
        if self.supports("class_counts"):
            keywords["class_counts"] = torch.tensor(class_counts(case.classes), dtype=dtype)
        if self.signature.takes_head_bias:
            keywords[HEAD_BIAS] = torch.zeros(case.classes, dtype=dtype)
        return keywords


def class_counts(classes: int) -> list[int]:
    """Training rows of each class [C]: many of the first, few of the last."""
    return [10 * (classes - label) for label in range(classes)]
