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
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.distributed import membership
from equiloss.errors import UserError
from equiloss.launching import ranks, slots, sweep_table
from equiloss.launching.claim import claim
from equiloss.launching.composition_errors import explain
from equiloss.launching.ledger import ATTEMPT, Ledger
from equiloss.launching.sweep import direction
from equiloss.records.run_dir import LAST_CHECKPOINT, TRACEBACK

if TYPE_CHECKING:
    from equiloss.records.results import Result

failures: list[str] = []
"""What ended jobs of this process, in one line each."""
# What the user wants of HYDRA_FULL_ERROR, which is set for Hydra: in other processes too.
TRACEBACKS = "EQUILOSS_TRACEBACK"


def launch(composed: DictConfig) -> float:
    """Do one job of Hydra's: run it, record how it ended, and return its objective.

    Args:
        composed: The job's composed configuration.

    Returns:
        The metric that `objective` names. For a failed job the worst possible value, since an
        exception or NaN would end a sweeper's whole study.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    job = _Job(str(composed.get("objective")))
    try:
        resolved = resolve(composed)
        group = membership.found()
        if group is None:
            objective = _do(resolved, run_dir, job)
        else:
            membership.join(group, resolved.config.trainer)
            objective = _do_with_others(resolved, run_dir, job)
    except KeyboardInterrupt:
        job.note("interrupted")
        raise
    except Exception as error:  # whatever ends a job must not end the sweep
        _report(error)
        job.note("failed", error=explain(error))
        if membership.found() is not None:
            membership.leave(1)
        # The value that no sweeper takes for a success.
        return -math.inf if job.direction == "maximize" else math.inf
    return objective


def _do(resolved: ResolvedConfig, run_dir: Path, job: _Job) -> float:
    """Do a job, or find it done; returns its objective."""
    with claim(run_dir, resolved) as todo:
        if not todo:
            print(f"completed already: {run_dir}", flush=True)
        job.note("running")
        if todo:
            _attempt(resolved, run_dir)
    return _told(resolved, run_dir, job, skipped=not todo)


def _do_with_others(resolved: ResolvedConfig, run_dir: Path, job: _Job) -> float:
    """The same on each of several ranks; the first one owns the directory."""
    membership.check_same(resolved.hash)
    run_dir = Path(membership.agreed(str(run_dir)))
    if membership.is_first():
        with claim(run_dir, resolved) as todo:
            membership.agreed(todo)
            job.note("running")
            if todo:
                _attempt(resolved, run_dir)
        objective = _told(resolved, run_dir, job, skipped=not todo)
    else:
        if membership.agreed(None):
            _attempt(resolved, run_dir)
        objective = math.nan
    return float(membership.agreed(objective))


def _told(resolved: ResolvedConfig, run_dir: Path, job: _Job, *, skipped: bool) -> float:
    """Show how a completed job went; returns its objective."""
    from equiloss.launching import console
    from equiloss.records.results import Result

    result = Result.read(run_dir)
    if not (skipped and job.in_sweep):
        console.show(result, run_dir)
    objective = _objective(resolved, result)
    job.note("completed", skipped=skipped, objective=objective)
    return objective


class _Job:
    """This job's part in a sweep; of a single run nothing is noted."""

    def __init__(self, objective: str) -> None:
        hydra = HydraConfig.get()
        self.direction = direction(hydra.sweeper, objective)
        self.began = time.monotonic()
        self.in_sweep = hydra.mode == RunMode.MULTIRUN
        if self.in_sweep:
            self.sweep_dir = Path(hydra.sweep.dir).absolute()
            self.directory = os.path.relpath(hydra.runtime.output_dir, self.sweep_dir)
            self.number = int(hydra.job.num)

    def note(self, status: str, **details: Any) -> None:
        """Tell the sweep how this job is doing."""
        if self.in_sweep and membership.is_first():
            if status != "running":
                details["seconds"] = time.monotonic() - self.began
            Ledger(self.sweep_dir).add(self.number, self.directory, status, **details)
            if status != "running":
                print(sweep_table.line(self.sweep_dir, os.environ.get(ATTEMPT, "")), flush=True)


def _attempt(resolved: ResolvedConfig, run_dir: Path) -> None:
    """Run, and record how it ended where it did not complete."""
    from equiloss.records.run_dir import RESULTS

    try:
        _run(resolved, run_dir)
    except KeyboardInterrupt:
        if membership.found() is not None and (run_dir / RESULTS).exists():
            raise  # a rank has failed and said why, and its launcher ends the others
        _record(resolved, run_dir, "interrupted", "interrupted by the user")
        if (run_dir / LAST_CHECKPOINT).exists():
            print(
                f"interrupted: the same command with hydra.run.dir={run_dir} goes on from the "
                "last checkpoint",
                file=sys.stderr,
            )
        raise
    except Exception as error:
        _record(resolved, run_dir, "failed", explain(error))
        trace = run_dir / TRACEBACK
        trace.write_text(_trace(error), encoding="utf-8")
        if not isinstance(error, UserError):
            error.add_note(f"traceback: {trace}")
        raise


def _run(resolved: ResolvedConfig, run_dir: Path) -> None:
    """Run in this process, or supervise ranks; the result is in the directory either way."""
    config, hydra = resolved.config, HydraConfig.get()
    world_size = membership.world_size(config.trainer)
    attempt = Ledger(Path(hydra.sweep.dir)).attempt(os.environ.get(ATTEMPT, ""))
    parallel = slots.parallel_jobs(hydra, attempt.jobs if attempt else 0)
    # Beside other jobs one rank is supervised too: its death ends no worker of the launcher.
    if membership.found() is None and (world_size > 1 or parallel > 1):
        if config.data.download:
            # Once, before several ranks would fetch the same files into the same place.
            from equiloss.data import datasets

            datasets.load(config.data)
        with slots.share(Path(hydra.sweep.dir).absolute(), config.trainer, parallel) as variables:
            ranks.supervise(run_dir, world_size, config.trainer.cpu_threads, variables)
        return

    import torch

    from equiloss.run import run

    threads = torch.get_num_threads()
    try:
        if resolved.config.trainer.cpu_threads is not None:
            torch.set_num_threads(resolved.config.trainer.cpu_threads)
        run(resolved, run_dir)
    except SystemExit as stopped:
        # Lightning turns Ctrl-C into an exit, and ignores further ones from then on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from stopped
    finally:
        torch.set_num_threads(threads)


def _objective(resolved: ResolvedConfig, result: Result) -> float:
    name = resolved.config.objective
    if name not in result.metrics:
        # An evaluation of another split than the objective's.
        return math.nan
    value = result.metrics[name]
    if value is None:
        raise UserError(f"the run completed, but its objective {name} is not finite")
    return value


def _record(resolved: ResolvedConfig, run_dir: Path, status: str, error: str) -> None:
    from equiloss.records.results import Result

    loss = dict(resolved.config.loss)
    Result(
        status=status,
        config_hash=resolved.hash,
        loss={"name": loss.pop("name"), "options": loss},
        error=error,
    ).write(run_dir)
    if resolved.config.logger.mlflow.enabled:
        from equiloss.records import trackers

        trackers.end_killed(resolved.config.logger, run_dir, status)


def _report(error: Exception) -> None:
    """Remember a failure and show it."""
    hydra = HydraConfig.get()
    job = f"job {hydra.job.num}: " if hydra.mode == RunMode.MULTIRUN else ""
    line = job + explain(error)
    failures.append(line)
    if os.environ.get(TRACEBACKS) == "1":
        print(_trace(error), file=sys.stderr)
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"error: {line}{where}", file=sys.stderr, flush=True)


def _trace(error: Exception) -> str:
    """The traceback; of the rank's own error where it happened in a rank."""
    if isinstance(error, ranks.RankError) and error.trace:
        return error.trace
    return "".join(traceback.format_exception(error))
