"""Laws of what torch may make of a loss: compiled code, and one gradient for each row."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from equiloss.conformance.case import Case
from equiloss.conformance.derivatives import parameters, shift
from equiloss.conformance.heads import head
from equiloss.conformance.keywords import options
from equiloss.conformance.law import Difference, DoesNotApply, apart, law
from equiloss.conformance.precision import accuracy, promotion
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss
from equiloss.conformance.targets import combinations

# It traces the loss and its backward pass, which is where a loss can go wrong, and runs in
# a tenth of a second. The default backend adds the generation of C++, which needs a compiler and
# takes 2 to 4 s for each loss.
BACKEND = "aot_eager"


# It takes longer than all laws before it, which are to hold first.
@law(combinations, shift, options, accuracy, promotion, parameters, head)
def compiled(subject: Subject) -> None:
    """torch.compile changes neither loss nor gradient."""
    # Imported here: it takes seconds, and no other law needs it.
    from torch._dynamo.eval_frame import is_dynamo_supported

    if not is_dynamo_supported():
        raise DoesNotApply("torch.compile does not run on this platform")

    def violates(case: Case) -> Difference | None:
        expected = subject.losses_and_gradient(case)
        logits = case.logits.clone().requires_grad_()
        # Without what an earlier call left behind: a change of shape is another matter.
        torch.compiler.reset()
        with _quietly(), errors_of_the_loss():
            got = torch.compile(subject.function(case), backend=BACKEND)(logits, case.target)
            (got_gradient,) = torch.autograd.grad(got.sum(), logits)
        return apart("compiled", case, (got.detach(), got_gradient), expected)

    search(subject, subject.combined(subject.batch(4, 4)), violates, tries=20)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's advice on what it traces: it is compiled for the numbers alone."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@law(combinations)
def per_sample_gradients(subject: Subject) -> str | None:
    """torch.func.vmap over grad gives each row's loss and gradient, where torch can map it."""
    remarks = []

    def violates(case: Case) -> Difference | None:
        expected = subject.losses_and_gradient(case)
        loss = subject.function(case)

        def of_row(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits.unsqueeze(0), target.unsqueeze(0)).squeeze(0)

        try:
            gradient, losses = vmap(grad_and_value(of_row))(case.logits, case.target)
        except Exception as error:  # torch's own limits, such as control flow that reads data
            why = shorten(str(error), 100, placeholder=" …")
            remarks.append(f"torch.func cannot map it: {why}")
            return None
        return apart("by vmap(grad)", case, (losses, gradient), expected)

    search(subject, subject.combined(subject.batch(4, 4)), violates)
    return remarks[0] if remarks else None
