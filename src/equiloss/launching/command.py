"""From a command line to an exit code: run an application of Hydra's and close its sweep."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import printable
from equiloss.launching import forks, slots, streams, sweep_table
from equiloss.launching.composition_errors import check_words, explain, mendable
from equiloss.launching.console import plain
from equiloss.launching.job import TRACEBACKS
from equiloss.launching.sweep import current_sweep
from equiloss.records.ledger import ATTEMPT, SWEEP, Entry

FULL_ERROR = "HYDRA_FULL_ERROR"


def main(application: Callable[[], Any]) -> None:
    """Run a `@hydra.main` application and exit: 0, 1 if a job failed, 128 + n after signal n.

    What a user caused is shown in one line without a traceback, unless HYDRA_FULL_ERROR=1.
    """
    atexit.register(interruption.ignore_at_the_end)  # the first, and so the last to be called
    streams.make_optional()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's: a line for each plugin
    membership.quieten_hydra(sys.argv)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # modules of a user who stands elsewhere than train.py
    full_error = os.environ.get(FULL_ERROR)
    variables = {
        # Hydra then raises its errors, so that they can be shown in one line.
        FULL_ERROR: "1",
        TRACEBACKS: full_error or "0",
        # Those of a sweep whose job gives this command are none of its own.
        SWEEP: None,
        ATTEMPT: None,
        slots.AT_ONCE: None,
    }
    try:
        with interruption.listening(), _environment(variables):
            check_words(sys.argv[1:])
            forks.install()
            with _ending_for_sure():
                application()
            sweep = current_sweep()
    except Interrupted as interrupted:
        sys.exit(interrupted.code)
    except Exception as error:
        if full_error == "1" or not (mendable(error) or isinstance(error.__cause__, OSError)):
            raise
        sys.exit(f"error: {explain(error)}")
    sys.exit(0 if sweep is None else _close(*sweep))


@contextmanager
def _ending_for_sure() -> Iterator[None]:
    """From an interruption on, have a second signal change no exit code."""
    try:
        with interruption.prevailing():
            yield
    except Interrupted as interrupted:
        interruption.end_with(interrupted.code)
        raise


def _close(sweep_dir: Path, entries: dict[int, Entry]) -> int:
    """Say how a sweep ended; returns the exit code."""
    failed = {job: entry for job, entry in entries.items() if entry.status != "completed"}
    for job, entry in failed.items():
        cause = entry.error or "it ended without a word"
        print(printable(f"error: job {job} ({entry.directory}): {cause}"), file=sys.stderr)
    if entries:
        console = Console()
        jobs, _ = sweep_table.table(sweep_dir)
        console.print(jobs)
        # Of failed runs too: parity may be what stopped them all.
        for line in (*_report_on(sweep_dir), *sweep_table.summary(sweep_dir)):
            console.print(plain(line), soft_wrap=True)
    print(f"sweep directory: {sweep_dir} ({len(entries) - len(failed)} of {len(entries)} done)")
    return 1 if failed else 0


def _report_on(sweep_dir: Path) -> list[str]:
    """Compare a sweep's runs. Whatever the report makes of them, they are done."""
    from equiloss.report.page import write_report

    try:
        comparison = write_report([sweep_dir])
        verdict = (comparison.verdict.headline, *comparison.careful)
        return comparison.summary(sweep_dir / "report", verdict)
    except Exception as error:
        print(f"warning: no report: {explain(error)}", file=sys.stderr)
        return []


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Have variables of the environment set, or unset, while the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
