"""Laws of the transforms of torch: torch.compile, and vmap over grad."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from equiloss.conformance.case import Case, Evaluation
from equiloss.conformance.derivatives import parameters, shift
from equiloss.conformance.heads import head
from equiloss.conformance.keywords import options
from equiloss.conformance.law import Difference, DoesNotApply, beyond_rounding, law
from equiloss.conformance.precision import accuracy, promotion
from equiloss.conformance.search import search
from equiloss.conformance.subject import Subject, errors_of_the_loss, evaluate_function
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
        expected = subject.evaluate(case)
        # Without what an earlier call left behind: a change of shape is another matter.
        torch.compiler.reset()
        with _quietly(), errors_of_the_loss():
            got = evaluate_function(torch.compile(subject.function(case), backend=BACKEND), case)
        return beyond_rounding("compiled", case, got, expected)

    search(subject, subject.combined(subject.batch(4, 4)), violates, tries=20)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence torch's advice on what it traces: it is compiled for the numbers alone."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@law(combinations)
def per_sample_gradients(subject: Subject) -> str | None:
    """torch.func.vmap over grad gives each row's loss and gradient, where torch can map it."""
    remarks = []

    def violates(case: Case) -> Difference | None:
        expected = subject.evaluate(case)
        loss = subject.function(case)

        def row_loss(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits.unsqueeze(0), target.unsqueeze(0)).squeeze(0)

        try:
            gradient, losses = vmap(grad_and_value(row_loss))(case.logits, case.target)
        except Exception as error:  # torch's own limits, such as control flow that reads data
            reason = shorten(str(error), 100, placeholder=" …")
            remarks.append(f"torch.func cannot map it: {reason}")
            return None
        return beyond_rounding("by vmap(grad)", case, Evaluation(losses, gradient), expected)

    search(subject, subject.combined(subject.batch(4, 4)), violates)
    return remarks[0] if remarks else None
