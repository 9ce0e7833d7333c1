"""The loss that is held against the laws, called as a run calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equiloss.conformance.case import Case, batch, class_weights, soft
from equiloss.errors import LossError, unknown
from equiloss.losses.adapter import adapted
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Projection
from equiloss.losses.signature import HEAD_BIAS, RESERVED, LossFunction, read

# Marks the rows that a case leaves out, where the loss says nothing else.
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
        yield
    except Exception as error:
        raise LossRaised(error) from error


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
        own = [key for key in self.signature.options if key not in RESERVED]
        for key in self.options:
            if key in RESERVED:
                raise LossError(
                    f"loss {self.name!r} is verified with every {key}: give its own options alone"
                )
            if key not in own:
                raise LossError(unknown(f"option of loss {self.name!r}", key, own))

    @property
    def is_module(self) -> bool:
        """Whether the loss is a class, made anew for each criterion."""
        return isinstance(self.loss, type)

    @property
    def fixed_classes(self) -> int | None:
        """The only number of classes it takes: its option `num_classes`, if it has one."""
        number = self.options.get("num_classes")
        if number is None and "num_classes" in self.signature.options:
            number = self.signature.options["num_classes"].default
        return number if isinstance(number, int) else None

    def supports(self, keyword: str) -> bool:
        """Whether it takes this reserved keyword."""
        return keyword in self.signature.supported

    def batch(self, rows: int, classes: int, **numbers: Any) -> Case:
        """As `case.batch`, with as many classes as the loss takes, inside its domain."""
        case = batch(rows, self.fixed_classes or classes, **numbers)
        # logsumexp(x) - min(x) <= max(x) - min(x) + log(C); a percent off the edge.
        room = 0.99 * (self.signature.domain(case.logits.dtype) - math.log(case.classes))
        if rows and 0 < room < math.inf:
            width = case.logits.amax(-1) - case.logits.amin(-1)  # [N]
            factor = (room / width).clamp(max=1)  # inf for equal logits
            return replace(case, logits=case.logits * factor.unsqueeze(-1))
        return case

    def is_outside(self, case: Case) -> bool:
        """Whether a row's logits spread further than the loss is sound for."""
        logits = case.logits.double()
        spread = logits.logsumexp(-1) - logits.amin(-1)
        return bool((spread > self.signature.domain(case.logits.dtype)).any())

    def with_options(self, **options: Any) -> Subject:
        """The same loss with other values."""
        changed = self.options | options
        return Subject(self.name, self.source, changed, registered=self.registered)

    def combined(self, case: Case) -> Iterator[Case]:
        """The case with every option that the loss supports: hard targets, then soft ones."""
        if self.supports("weight"):
            case = replace(case, weight=class_weights(case.classes))
        if self.supports("label_smoothing"):
            case = replace(case, label_smoothing=0.25)
        yield with_ignored_rows(case, self.ignored) if self.supports("ignore_index") else case
        if self.signature.soft_targets:
            yield soft(case)

    @property
    def ignored(self) -> int:
        """The target of ignored rows where a case does not say."""
        option = self.signature.options.get("ignore_index")
        return option.default if option and isinstance(option.default, int) else IGNORED

    def ignored_in(self, case: Case) -> int:
        """The target of a case's ignored rows."""
        return self.ignored if case.ignore_index is None else case.ignore_index

    def criterion(self, case: Case) -> Criterion:
        """The criterion of a run with the case's options, always the same one.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        classes = case.classes if self.supports("class_counts") or case.weight else None
        key = (
            *(classes, case.weight, case.label_smoothing, case.ignore_index),
            case.logits.dtype == torch.float64,
        )
        if key not in self._criteria:
            self._criteria[key] = self.make(case)
        return self._criteria[key]

    def make(self, case: Case, seed: int = 0) -> Criterion:
        """A new criterion; a loss with random parameters has other ones for another seed.

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
            made = Criterion(self.loss, **options)
        # As a run does with `trainer.precision=64-true`.
        return made.double() if case.logits.dtype == torch.float64 else made

    def given(self, logits: Tensor) -> Tensor | Projection:
        """What the criterion takes: logits, or features and a head that give the same logits."""
        if not self.signature.wants_features:
            return logits
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
        return Projection(
            logits, eye, eye.new_zeros(len(eye)) if self.signature.takes_head_bias else None
        )

    def losses(self, case: Case) -> Tensor:
        """Loss of each row [N], without gradient.

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        criterion = self.criterion(case)
        with torch.no_grad(), errors_of_the_loss():
            return criterion.per_sample(self.given(case.logits.clone()), case.target.clone())

    def losses_and_gradient(self, case: Case) -> tuple[Tensor, Tensor]:
        """Loss of each row [N], and the gradient of their sum in the logits [N, C].

        Raises:
            LossRaised: with the loss's own error as its cause.
        """
        criterion = self.criterion(case)
        logits = case.logits.clone().requires_grad_()
        with errors_of_the_loss():
            losses = criterion.per_sample(self.given(logits), case.target.clone())
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return losses.detach(), gradient

    def function(self, case: Case) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss itself, without the criterion, given the keywords of `keywords`."""
        loss, keywords = self.criterion(case).loss, self.keywords(case)
        if not self.signature.wants_features:
            return partial(loss, **keywords)
        head_weight = self.leading(case)["head_weight"]

        def of_features(features: Tensor, target: Tensor, **more: Any) -> Tensor:
            losses: Tensor = loss(features, head_weight, target, **keywords, **more)
            return losses

        return of_features

    def leading(self, case: Case) -> dict[str, Tensor]:
        """What the loss begins with, by name."""
        given = self.given(case.logits)
        if isinstance(given, Projection):
            head = {"features": given.features, "head_weight": given.weight}
            return {**head, "target": case.target}
        return {"logits": given, "target": case.target}

    def keywords(self, case: Case) -> dict[str, Any]:
        """What the criterion hands over beside logits, or features and head, and targets."""
        dtype = case.logits.dtype
        found: dict[str, Any] = {} if self.is_module else dict(self.options)
        if self.supports("label_smoothing"):
            found["label_smoothing"] = case.label_smoothing
        if self.supports("ignore_index") and not case.soft:
            found["ignore_index"] = self.ignored_in(case)
        if case.weight is not None:
            found["weight"] = torch.tensor(case.weight, dtype=dtype)
        if self.supports("class_counts"):
            found["class_counts"] = torch.tensor(class_counts(case.classes), dtype=dtype)
        if self.signature.takes_head_bias:
            found[HEAD_BIAS] = torch.zeros(case.classes, dtype=dtype)
        return found


def class_counts(classes: int) -> list[int]:
    """Rows of each class in a training set: many of the first, few of the last."""
    return [10 * (classes - label) for label in range(classes)]


def with_ignored_rows(case: Case, ignored: int) -> Case:
    """The case with every third row ignored, from the second on."""
    target = case.target.clone()
    target[1::3] = ignored
    # An ignored class is no target of a row that counts.
    own = torch.arange(len(target)) % 3 != 1
    clash = own & (target == ignored)
    return replace(case, target=torch.where(clash, (ignored + 1) % case.classes, target))
