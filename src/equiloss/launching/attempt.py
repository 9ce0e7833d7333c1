"""One attempt at a run, whoever asked for it: carried out, and recorded however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from equiloss.config import Config
from equiloss.config.resolved import ResolvedConfig
from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import UserError
from equiloss.imports import import_target, import_torchmetrics
from equiloss.launching import ranks, slots
from equiloss.launching.composition_errors import explain
from equiloss.launching.job import trace
from equiloss.launching.resume import is_completed
from equiloss.records.atomic import write_atomically
from equiloss.records.results import Result
from equiloss.records.run_dir import RESULTS, TRACEBACK, has_state
from equiloss.records.train_log import note
from equiloss.records.writing import FileError

Share = AbstractContextManager[Mapping[str, str]]


def attempt(
    resolved: ResolvedConfig,
    run_dir: Path,
    run: str,
    *,
    again: str,
    share: Share | None = None,
    is_fork: bool = False,
) -> None:
    """Run, and record how it ended where it did not complete.

    Args:
        resolved: The run's configuration, which `run_dir` holds.
        run_dir: Claimed for it.
        run: package.module:function of a run, which is imported where it runs.
        again: What a user does to go on with a run that was interrupted.
        share: Gives variables of the environment, and is held while ranks work, where other jobs
            run beside this one.
        is_fork: Whether this process is there for this run alone.

    Raises:
        UserError: for what a user can mend.
        Interrupted: if this process was asked to stop.
    """
    before = _version(run_dir / RESULTS)
    if membership.is_first():
        note(run_dir, about(resolved.config))
    try:
        with interruption.prevailing():
            _carry_out(resolved, run_dir, run, share, is_fork)
    except Interrupted as interrupted:
        result = _result_so_far(resolved, run_dir, before)
        if membership.external() is not None and result.status == "failed":
            raise  # a rank has failed and said why, and its launcher ends the others
        result = replace(result, status="interrupted", error=str(interrupted))
        _record(resolved, run_dir, result)
        way_on = f": {again} goes on" * has_state(run_dir)
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


def about(config: Config) -> str:
    """What a run is, in a line."""
    return f"{config.task}: {config.loss['name']}, {config.model.name}, {config.data.name}"


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


def _carry_out(
    resolved: ResolvedConfig, run_dir: Path, run: str, share: Share | None, is_fork: bool
) -> None:
    """Run in this process, or supervise ranks; the result is in the directory either way."""
    config = resolved.config
    world_size = membership.ranks_asked_for(config.trainer)
    # Beside other jobs one rank is supervised too: its death ends no worker of the launcher. A
    # fork is no such worker, but may have been made by one that had a GPU.
    own = share is None or (is_fork and config.trainer.accelerator == "cpu")
    if membership.external() is not None or (world_size == 1 and own):
        with share or nullcontext():
            _in_this_process(resolved, run_dir, run, len(slots.cores()) if share else None)
        return
    if config.data.download:
        # Once, before several ranks would fetch the same files into the same place.
        from equiloss.data import datasets

        datasets.load(config.data)
    if config.model.download and config.task == "fit" and not has_state(run_dir):
        from equiloss.models import weights

        weights.fetch(config.model)
    with share or nullcontext({}) as variables:
        ranks.supervise(run_dir, run, world_size, config.trainer, variables)
    if not is_completed(run_dir):
        raise UserError("every rank ended without an error, and without the run's results")


def _in_this_process(
    resolved: ResolvedConfig, run_dir: Path, run: str, threads: int | None
) -> None:
    """Call a run; an end of the process is an error of the run.

    Args:
        resolved: The run's configuration.
        run_dir: Its directory.
        run: package.module:function.
        threads: CPU threads where the configuration has no number (None: torch's own).
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


def _record(resolved: ResolvedConfig, run_dir: Path, result: Result) -> None:
    """Write the result of a run that did not complete, and tell MLflow where it could not."""
    with suppress(FileError):  # it may be a full disk that ended the run
        result.write(run_dir)
    if resolved.config.logger.mlflow.enabled:
        # Imported here: it takes Lightning along, and a process that supervises does without.
        from equiloss.records import trackers

        trackers.end_killed(resolved.config.logger, run_dir, result.status)
