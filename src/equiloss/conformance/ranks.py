"""The law of ranks: the global batch has the same loss and gradient on several processes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from equiloss.conformance.case import Case, rounding
from equiloss.conformance.law import Broken, Difference, DoesNotApply, Finding, law
from equiloss.conformance.search import counter_example
from equiloss.conformance.subject import Subject
from equiloss.conformance.transforms import compiled, per_sample_gradients
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import RankEndedError, run_ranks
from equiloss.errors import LossError
from equiloss.imports import import_target
from equiloss.losses import reduction

# Rows of each rank, by world size: uneven, and with a rank that has none.
ONE_ROW: dict[int, tuple[int, ...]] = {1: (1,), 2: (1, 0), 3: (0, 1, 0)}
SEVEN_ROWS: dict[int, list[tuple[int, ...]]] = {1: [(7,)], 2: [(6, 1), (0, 7)], 3: [(1, 0, 6)]}


class Job(NamedTuple):
    """A step on a global batch whose rows are spread over ranks."""

    name: str
    target: str
    """package.module:attribute of the loss."""
    options: dict[str, Any]
    case: Case
    rows: tuple[int, ...]
    """Rows of each rank."""


@dataclass
class Step:
    """Result of one job on one rank."""

    loss: float = 0.0
    """Of the global batch."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of that loss: in this rank's `logits` [n, C], and in the loss's parameters."""
    error: str = ""
    """The error that the loss raised."""
    importable: bool = True


@law(compiled, per_sample_gradients)
def ranks(subject: Subject) -> None:
    """On 1, 2 and 3 processes a global batch has the loss and gradient that it has on one."""
    (finding,) = check_ranks([subject])
    if isinstance(finding, Exception):
        raise finding


def check_ranks(subjects: Sequence[Subject]) -> list[Finding]:
    """Check the law of ranks for many losses at once: starting processes is what takes the time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return [DoesNotApply("this torch has no gloo") for _ in subjects]
    targets = {subject: _import_path(subject) for subject in subjects}
    not_in_module = "another process cannot import it: it is not in a module by its name"
    findings: dict[Subject, Finding] = {
        subject: None if target else DoesNotApply(not_in_module)
        for subject, target in targets.items()
    }
    for world_size in ONE_ROW:
        jobs = {
            subject: list(_jobs(subject, targets[subject], world_size))
            for subject, finding in findings.items()
            if finding is None
        }
        findings |= _run_and_judge(world_size, jobs)
    return [findings[subject] for subject in subjects]


def _import_path(subject: Subject) -> str:
    """The `module:attribute` by which another process can import the loss; empty if it cannot."""
    loss = subject.source
    module, name = str(getattr(loss, "__module__", "")), str(getattr(loss, "__qualname__", ""))
    with suppress(KeyError, AttributeError):
        if module != "__main__" and attrgetter(name)(sys.modules[module]) is loss:
            return f"{module}:{name}"
    return ""


def _jobs(subject: Subject, target: str, world_size: int) -> Iterator[Job]:
    """The jobs of one loss: the smallest batch first, then larger ones."""
    small = subject.batch(1, 2, scale=0)
    yield Job(subject.name, target, subject.options, small, ONE_ROW[world_size])
    for case in subject.combined(subject.batch(7, 4)):
        for rows in SEVEN_ROWS[world_size]:
            yield Job(subject.name, target, subject.options, case, rows)


def _run_and_judge(world_size: int, jobs: dict[Subject, list[Job]]) -> dict[Subject, Finding]:
    """Run the jobs of all losses in one process group; a loss that brings a rank down is broken."""
    if not jobs:
        return {}
    try:
        # As bytes: a rank that cannot read them says so, and tensors go by value.
        all_jobs = pickle.dumps([job for loss_jobs in jobs.values() for job in loss_jobs])
        steps = zip(*run_ranks(measure, world_size, all_jobs), strict=True)
    except RankEndedError as error:
        if len(jobs) == 1:
            last_line = str(error).strip().splitlines()[-1]
            return dict.fromkeys(jobs, Broken.by_error(f"on {world_size} processes, {last_line}"))
        # One of them did it: each by itself, so that it breaks no other.
        parts = [_run_and_judge(world_size, {subject: jobs[subject]}) for subject in jobs]
        return {subject: finding for part in parts for subject, finding in part.items()}
    return {
        subject: _judge(subject, [(job, next(steps)) for job in loss_jobs])
        for subject, loss_jobs in jobs.items()
    }


def measure(jobs: bytes) -> list[Step]:
    """Make one step of each job on this rank."""
    return [_step(job) for job in pickle.loads(jobs)]


def _step(job: Job) -> Step:
    """Make a step on this rank's rows: the global loss, and gradients averaged over ranks."""
    world_size = collectives.world_size()
    rank = dist.get_rank() if world_size > 1 else 0
    first = sum(job.rows[:rank])
    case = job.case.select(list(range(first, first + job.rows[rank])))
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
            criterion = subject.new_criterion(case)
            learned = criterion.named_parameters()
            leaves |= {key: value for key, value in learned if value.requires_grad}
            total, mass = criterion(subject.outputs(logits), case.target)
        except Exception as error:  # the loss's own; the other ranks wait for this one
            step.error = f"{type(error).__name__}: {error}"
    sums = collectives.sum_over_ranks(torch.stack([total.detach(), mass]))
    step.loss = reduction.mean(*sums).item()
    rank_loss = reduction.rank_loss(total, sums[1])
    gradients = torch.autograd.grad(
        rank_loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for key, gradient in zip(leaves, gradients, strict=True):
        summed = gradient if key == "logits" else collectives.sum_over_ranks(gradient)
        step.gradients[key] = summed / world_size
    return step


def _judge(subject: Subject, results: list[tuple[Job, tuple[Step, ...]]]) -> Finding:
    """Compare the steps of all ranks with that of one process, for each job of a loss."""
    for job, steps in results:
        if not all(step.importable for step in steps):
            return DoesNotApply(f"another process cannot import it: {steps[0].error}")
        difference = _difference(job, steps)
        if difference is not None:
            what = f"{difference.what} on {len(steps)} processes with {list(job.rows)} rows"
            return Broken(counter_example(subject, job.case, replace(difference, what=what)))
    return None


def _difference(job: Job, steps: tuple[Step, ...]) -> Difference | None:
    """The first result of a rank that is not that of one process with the whole batch."""
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
