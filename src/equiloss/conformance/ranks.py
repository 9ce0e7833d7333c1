"""The law of ranks: the global batch has the same loss and gradient on several processes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from equiloss.conformance.case import Case, rounding
from equiloss.conformance.law import Broken, CounterExample, Difference, DoesNotApply, law
from equiloss.conformance.search import counter_example
from equiloss.conformance.subject import Subject
from equiloss.conformance.transforms import compiled, per_sample_gradients
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import LossError
from equiloss.imports import import_target
from equiloss.losses import reduction

# Rows of each rank, by world size: uneven, and with a rank that has none.
ONE_ROW: dict[int, tuple[int, ...]] = {1: (1,), 2: (1, 0), 3: (0, 1, 0)}
SEVEN_ROWS: dict[int, list[tuple[int, ...]]] = {1: [(7,)], 2: [(6, 1), (0, 7)], 3: [(1, 0, 6)]}


class Job(NamedTuple):
    """A global batch, and how its rows are spread over ranks."""

    name: str
    target: str
    """package.module:attribute of the loss."""
    options: dict[str, Any]
    case: Case
    rows: tuple[int, ...]
    """Rows of each rank."""


@dataclass
class Step:
    """What one rank found."""

    loss: float = 0.0
    """Of the global batch."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of that loss: in this rank's `logits` [n, C], and in the loss's parameters."""
    error: str = ""
    """What the loss raised."""
    importable: bool = True


Outcome = Broken | DoesNotApply | None


@law(compiled, per_sample_gradients)
def ranks(subject: Subject) -> None:
    """On 1, 2 and 3 processes a global batch has the loss and gradient that it has on one."""
    (outcome,) = check_ranks([subject])
    if outcome is not None:
        raise outcome


def check_ranks(subjects: Sequence[Subject]) -> list[Outcome]:
    """The law of ranks for many losses at once: starting processes is what takes the time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return [DoesNotApply("this torch has no gloo") for _ in subjects]
    outcomes: list[Outcome] = [None] * len(subjects)
    targets: dict[int, str] = {}
    for number, subject in enumerate(subjects):
        try:
            targets[number] = _place(subject)
        except DoesNotApply as reason:
            outcomes[number] = reason
    for world_size in ONE_ROW:
        jobs = {
            number: list(_jobs(subjects[number], target, world_size))
            for number, target in targets.items()
            if outcomes[number] is None
        }
        for number, found in _run_all(world_size, jobs).items():
            if isinstance(found, str):
                error = f"on {world_size} processes, {found}"
                outcomes[number] = Broken(CounterExample.of_error(error))
            else:
                outcomes[number] = _judge(subjects[number], jobs[number], found)
    return outcomes


def _place(subject: Subject) -> str:
    """Where another process finds the loss.

    Raises:
        DoesNotApply: if it does not.
    """
    loss = subject.source
    module, name = str(getattr(loss, "__module__", "")), str(getattr(loss, "__qualname__", ""))
    try:
        found = module != "__main__" and attrgetter(name)(sys.modules[module]) is loss
    except (KeyError, AttributeError):
        found = False
    if not found:
        raise DoesNotApply("another process cannot import it: it is not in a module by its name")
    return f"{module}:{name}"


def _jobs(subject: Subject, target: str, world_size: int) -> Iterator[Job]:
    """The smallest batch first, then larger ones."""
    small = subject.batch(1, 2, scale=0)
    yield Job(subject.name, target, subject.options, small, ONE_ROW[world_size])
    for case in subject.combined(subject.batch(7, 4)):
        for rows in SEVEN_ROWS[world_size]:
            yield Job(subject.name, target, subject.options, case, rows)


def _run_all(
    world_size: int, jobs: dict[int, list[Job]]
) -> dict[int, list[tuple[Step, ...]] | str]:
    """Steps of all ranks for each job; an error where the loss brings a rank down."""
    every = [job for own in jobs.values() for job in own]
    if not every:
        return {}
    try:
        steps = iter(_run(world_size, every))
    except RuntimeError as error:
        if len(jobs) == 1:
            (number,) = jobs
            return {number: str(error).strip().splitlines()[-1]}
        # One of them did it: each by itself, so that it breaks no other.
        alone = (_run_all(world_size, {number: own}) for number, own in jobs.items())
        return {number: found for one in alone for number, found in one.items()}
    return {number: [next(steps) for _ in own] for number, own in jobs.items()}


def _run(world_size: int, jobs: list[Job]) -> list[tuple[Step, ...]]:
    # As bytes: a rank that cannot read them says so, and tensors go by value.
    by_rank = run_ranks(measure, world_size, pickle.dumps(jobs))
    return list(zip(*by_rank, strict=True))


def measure(jobs: bytes) -> list[Step]:
    """One step of each job on this rank."""
    return [_step(job) for job in pickle.loads(jobs)]


def _step(job: Job) -> Step:
    world_size = collectives.world_size()
    rank = dist.get_rank() if world_size > 1 else 0
    first = sum(job.rows[:rank])
    case = job.case.at(list(range(first, first + job.rows[rank])))
    step = Step()
    logits = case.logits.requires_grad_()
    leaves: dict[str, Tensor] = {"logits": logits}
    total, mass = logits.sum() * 0, torch.zeros((), dtype=logits.dtype)
    try:
        loss = import_target(job.target, "loss", LossError)
    except Exception as error:  # whatever the module does when it is imported
        step.importable, step.error = False, str(error)
    else:
        try:
            subject = Subject(job.name, loss, job.options, registered=False)
            criterion = subject.make(case)
            leaves |= dict(criterion.named_parameters())
            total, mass = criterion(subject.given(logits), case.target)
        except Exception as error:  # the loss's own; the other ranks wait for this one
            step.error = f"{type(error).__name__}: {error}"
    sums = collectives.sum_over_ranks(torch.stack([total.detach(), mass]))
    step.loss = reduction.mean(*sums).item()
    share = torch.autograd.grad(
        reduction.rank_loss(total, sums[1]), list(leaves.values()), allow_unused=True
    )
    for key, gradient in zip(leaves, share, strict=True):
        averaged = torch.zeros_like(leaves[key]) if gradient is None else gradient
        if key != "logits":
            averaged = collectives.sum_over_ranks(averaged)
        step.gradients[key] = averaged / world_size
    return step


def _judge(subject: Subject, jobs: list[Job], found: list[tuple[Step, ...]]) -> Outcome:
    for job, steps in zip(jobs, found, strict=True):
        if not all(step.importable for step in steps):
            return DoesNotApply(f"another process cannot import it: {steps[0].error}")
        difference = _difference(job, steps)
        if difference is not None:
            where = f"{len(steps)} processes with {list(job.rows)} rows"
            what = f"{difference.what} on {where}"
            shown = Difference(what, difference.got, difference.expected)
            return Broken(counter_example(subject, job.case, shown))
    return None


def _difference(job: Job, steps: tuple[Step, ...]) -> Difference | None:
    """What the ranks found that one process does not."""
    for rank, step in enumerate(steps):
        if step.error:
            return Difference(f"error of rank {rank}", step.error, "")
    expected = _step(job._replace(rows=(job.case.rows,)))
    # The bounds of all rows added up: a mean errs by less, whatever the order of its sum.
    ones = torch.ones_like(job.case.logits)
    bound = rounding(job.case, torch.full((job.case.rows,), expected.loss), ones).sum().item()
    for step in steps:
        if not abs(step.loss - expected.loss) <= bound:
            return Difference("global loss", step.loss, expected.loss)
    rows = torch.cat([step.gradients["logits"] for step in steps])
    for key, exact in expected.gradients.items():
        for got in [rows] if key == "logits" else [step.gradients[key] for step in steps]:
            if not ((got - exact).abs() <= bound).all():
                return Difference(f"gradient of {key.removeprefix('loss.')}", got, exact)
    return None
