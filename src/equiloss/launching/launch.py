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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import OUT_OF_TIME, Interrupted
from equiloss.errors import UserError
from equiloss.imports import import_target, import_torchmetrics
from equiloss.launching import console, ranks, slots, streams
from equiloss.launching.composition_errors import explain
from equiloss.launching.job import Job, trace
from equiloss.launching.precision import settled
from equiloss.launching.resume import claim, is_completed
from equiloss.launching.stored_run import of_run, user_paths
from equiloss.records.atomic import write_atomically
from equiloss.records.ledger import ATTEMPT, Ledger
from equiloss.records.results import Result
from equiloss.records.run_dir import RESULTS, TRACEBACK, has_state
from equiloss.records.train_log import note
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
            resolved = settled(resolved, run_dir)
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
                _attempt(resolved, run_dir, job.run)
        objective = _close(resolved, run_dir, job, skipped=not todo)
    elif membership.from_first_rank(None):
        _attempt(resolved, run_dir, job.run)
    return float(membership.from_first_rank(objective))


def _close(resolved: ResolvedConfig, run_dir: Path, job: Job, *, skipped: bool) -> float:
    """Print and note the result of a completed job; returns its objective."""
    result = Result.read(run_dir)
    if not (skipped and job.in_sweep):
        console.show(result, run_dir)
    objective = _objective(resolved, result)
    job.note("completed", skipped=skipped, objective=objective)
    return objective


def _attempt(resolved: ResolvedConfig, run_dir: Path, run: str) -> None:
    """Run, and record how it ended where it did not complete."""
    before = _version(run_dir / RESULTS)
    config = resolved.config
    about = f"{config.task}: {config.loss['name']}, {config.model.name}, {config.data.name}"
    if membership.is_first():
        # At once: what a run imports takes seconds.
        print(f"{about} in {run_dir}", flush=True)
        note(run_dir, about)
    try:
        with interruption.prevailing():
            _run(resolved, run_dir, run)
    except Interrupted as interrupted:
        result = _result_so_far(resolved, run_dir, before)
        if membership.external() is not None and result.status == "failed":
            raise  # a rank has failed and said why, and its launcher ends the others
        result = replace(result, status="interrupted", error=str(interrupted))
        _record(resolved, run_dir, result)
        way_on = f": the same command with hydra.run.dir={run_dir} goes on" * has_state(run_dir)
        note(run_dir, f"{interrupted} after {_steps(result)}")
        print(f"{interrupted} after {_steps(result)}{way_on}", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        result = _result_so_far(resolved, run_dir, before)
        _record(resolved, run_dir, replace(result, status="failed", error=explain(error)))
        note(run_dir, f"failed: {explain(error)}")
        with suppress(FileError):
            write_atomically(run_dir / TRACEBACK, trace(error))
            if not isinstance(error, UserError):
                error.add_note(f"traceback: {run_dir / TRACEBACK}")
        raise


def _steps(result: Result) -> str:
    taken = result.steps.get("taken", 0)
    return f"{taken} step{'' if taken == 1 else 's'}"


def _version(file: Path) -> tuple[int, int] | None:
    """What tells one version of a file from the next; None where there is none."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _result_so_far(
    resolved: ResolvedConfig, run_dir: Path, before: tuple[int, int] | None
) -> Result:
    """What the run itself wrote in this attempt as it broke off, or a result without figures."""
    if _version(run_dir / RESULTS) not in (None, before):
        return Result.read(run_dir)
    options = dict(resolved.config.loss)
    return Result("running", resolved.hash, {"name": options.pop("name"), "options": options})


def _run(resolved: ResolvedConfig, run_dir: Path, run: str) -> None:
    """Run in this process, or supervise ranks; the result is in the directory either way."""
    config, hydra = resolved.config, HydraConfig.get()
    world_size = membership.ranks_asked_for(config.trainer)
    attempt = Ledger(Path(hydra.sweep.dir)).attempt(os.environ.get(ATTEMPT, ""))
    parallel = slots.parallel_jobs(hydra, attempt.jobs if attempt else 0)
    # Beside other jobs one rank is supervised too: its death ends no worker of the launcher.
    shares = slots.share(Path(hydra.sweep.dir).absolute(), config.trainer, parallel, config.in_use)
    if slots.AT_ONCE in os.environ and world_size == 1 and config.trainer.accelerator == "cpu":
        with shares:  # a fork for this job alone
            in_this_process(resolved, run_dir, run, threads=len(slots.cores()))
        return
    if membership.external() is None and (world_size > 1 or parallel > 1):
        if config.data.download:
            # Once, before several ranks would fetch the same files into the same place.
            from equiloss.data import datasets

            datasets.load(config.data)
        with shares as variables:
            ranks.supervise(run_dir, run, world_size, config.trainer, variables)
        if not is_completed(run_dir):
            raise UserError("every rank ended without an error, and without the run's results")
        return
    in_this_process(resolved, run_dir, run)


def in_this_process(
    resolved: ResolvedConfig, run_dir: Path, run: str, threads: int | None = None
) -> None:
    """Call a run; an end of the process is an error of the run.

    Args:
        resolved: The run's configuration.
        run_dir: Its directory.
        run: package.module:function.
        threads: CPU threads unless the configuration has a number (None: torch's own).
    """
    import torch

    before = torch.get_num_threads()
    try:
        if wanted := resolved.config.trainer.cpu_threads or threads:
            torch.set_num_threads(wanted)
        with _no_exit():
            import_torchmetrics()
            import_target(run, "run", UserError)(resolved, run_dir)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_exit() -> Iterator[None]:
    """Take an end of this process for the failure of its run: without its results it is none else.

    Raises:
        UserError: in place of the exit.
    """
    process, leave = os.getpid(), os._exit

    def refuse(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)  # as every forked process does in its end
        raise UserError(f"code of the run ended the process by os._exit({status})")

    os._exit = refuse
    try:
        yield
    except SystemExit as stopped:
        raise UserError(f"code of the run ended the process by sys.exit({stopped.code})") from None
    finally:
        os._exit = leave


def _objective(resolved: ResolvedConfig, result: Result) -> float:
    name = resolved.config.objective
    if name not in result.metrics:
        # An evaluation of another split than the objective's.
        return math.nan
    value = result.metrics[name]
    if value is None:
        raise UserError(f"the run completed, but its objective {name} is not finite")
    return value


def _record(resolved: ResolvedConfig, run_dir: Path, result: Result) -> None:
    """Write the result of a run that did not complete, and tell MLflow where it could not."""
    with suppress(FileError):  # it may be a full disk that ended the run
        result.write(run_dir)
    if resolved.config.logger.mlflow.enabled:
        # Imported here: it takes Lightning along, and a process that supervises does without.
        from equiloss.records import trackers

        trackers.end_killed(resolved.config.logger, run_dir, result.status)
