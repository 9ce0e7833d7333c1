"""From Hydra's command line to runs: one process, or a supervised group of ranks.

Hydra composes once, here. One device runs in this process. Several run as children that read
the same resolved `config.yaml` (see `equiloss.launching.ranks`); this process then never joins a
process group, so whatever becomes of one job cannot reach the next.

A failed job is recorded and reported, and a multirun goes on with the next one; the exit code
says at the end whether any failed.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import OUT_OF_TIME, Interrupted
from equiloss.errors import UserError
from equiloss.launching import console, slots, streams
from equiloss.launching.attempt import about, attempt
from equiloss.launching.composition_errors import explain
from equiloss.launching.job import Job
from equiloss.launching.precision import settled
from equiloss.launching.pretrained import following_weights
from equiloss.launching.resume import claim
from equiloss.launching.stored_run import of_run, user_paths
from equiloss.records.ledger import ATTEMPT, Ledger
from equiloss.records.results import Result
from equiloss.records.writing import FileError


def launch(composed: DictConfig, run: str) -> float:
    """Do one job of Hydra's: run it, record how it ended, and return its objective.

    A failed job of a sweep does not end the sweep; a failed single run ends the process.

    Args:
        composed: The job's composed configuration.
        run: package.module:function of a run, which is imported where it runs.

    Returns:
        The metric that `objective` names. For a failed job the worst possible value, since an
        exception or NaN would end a sweeper's whole study.
    """
    streams.make_optional()  # in a worker of a parallel launcher, too
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    job = Job(composed, run)
    # In a worker of a launcher this process has no `command.main`.
    with interruption.listening():
        return _launch(composed, run_dir, job)


def _launch(composed: DictConfig, run_dir: Path, job: Job) -> float:
    try:
        with interruption.prevailing():
            user_paths(composed)
            resolved = resolve(of_run(composed, HydraConfig.get().overrides.task))
            membership.join(resolved.config.trainer)
            resolved = settled(following_weights(resolved), run_dir)
            return _do(resolved, run_dir, job)
    except Interrupted as interrupted:
        with suppress(FileError):  # which would let the sweep go on
            job.note("interrupted", error=str(interrupted))
        if membership.external() is not None:
            membership.leave(interrupted.code)
        if not (job.in_sweep and interrupted.code == OUT_OF_TIME):
            raise
        return job.worst
    except Exception as error:  # whatever ends a job must not end the sweep
        job.report(error)
        try:
            job.note("failed", error=explain(error))
        finally:
            if membership.external() is not None:
                membership.leave(1)
        if not job.in_sweep:
            sys.exit(1)
        return job.worst


def _do(resolved: ResolvedConfig, run_dir: Path, job: Job) -> float:
    """Do a job, or find it done; of several ranks the first owns the directory."""
    membership.check_same_config(resolved.hash)
    run_dir = Path(membership.from_first_rank(str(run_dir)))
    objective = math.nan
    if membership.is_first():
        with claim(run_dir, resolved) as todo:
            membership.from_first_rank(todo)
            if not todo:
                print(f"completed already: {run_dir}", flush=True)
            job.note("running")
            if todo:
                _attempt(resolved, run_dir, job)
        objective = _close(resolved, run_dir, job, skipped=not todo)
    elif membership.from_first_rank(None):
        _attempt(resolved, run_dir, job)
    return float(membership.from_first_rank(objective))


def _close(resolved: ResolvedConfig, run_dir: Path, job: Job, *, skipped: bool) -> float:
    """Print and note the result of a completed job; returns its objective."""
    result = Result.read(run_dir)
    if not (skipped and job.in_sweep):
        console.show(result, run_dir)
    objective = _objective(resolved, result)
    job.note("completed", skipped=skipped, objective=objective)
    return objective


def _attempt(resolved: ResolvedConfig, run_dir: Path, job: Job) -> None:
    """Run, with this job's share of the machine where others run beside it."""
    config, hydra = resolved.config, HydraConfig.get()
    if membership.is_first():
        # At once: what a run imports takes seconds.
        print(f"{about(config)} in {run_dir}", flush=True)
    sweep_dir = Path(hydra.sweep.dir).absolute()
    known = Ledger(sweep_dir).attempt(os.environ.get(ATTEMPT, ""))
    parallel = slots.parallel_jobs(hydra, known.jobs if known else 0)
    share = slots.share(sweep_dir, config.trainer, parallel, config.in_use)
    attempt(
        *(resolved, run_dir, job.run),
        again="the same command" + f" with hydra.run.dir={run_dir}" * (not job.in_sweep),
        share=share if parallel > 1 else None,
        is_fork=slots.AT_ONCE in os.environ,
    )
    if not job.in_sweep and membership.external() is None:
        # It is done: a signal has nothing left to stop, and may end what is printed of it.
        interruption.end_with(0)


def _objective(resolved: ResolvedConfig, result: Result) -> float:
    name = resolved.config.objective
    if name not in result.metrics:
        # An evaluation of another split than the objective's.
        return math.nan
    value = result.metrics[name]
    if value is None:
        raise UserError(f"the run completed, but its objective {name} is not finite")
    return value
