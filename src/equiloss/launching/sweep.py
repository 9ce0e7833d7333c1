"""A sweep as a whole: its directory, who works on it, and how many jobs it has.

A sweep directory is named by its overrides; the same command finds it again, leaves completed
runs alone, continues interrupted ones and retries failed ones (see `equiloss.launching.resume`).
How the jobs are doing is in its ledger (see `equiloss.records.ledger`).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from equiloss.config.metrics import mode_of, with_modes
from equiloss.config.trainer import AUTO
from equiloss.distributed import membership
from equiloss.errors import UserError
from equiloss.launching import sweep_table
from equiloss.launching.composition_errors import explain
from equiloss.launching.lock import hold
from equiloss.launching.precision import measure
from equiloss.records.ledger import ATTEMPT, SWEEP, Entry, Ledger

# Seconds between two looks at a ledger that other processes write.
POLL = 1.0


def direction(sweeper: Any, config: DictConfig) -> str:
    """Whether a sweep's objective is to become small or large: minimize | maximize."""
    configured = sweeper.get("direction")
    if configured is not None:
        return str(configured)
    objective = str(config.get("objective"))
    name = objective.partition("/")[2]
    entry = OmegaConf.select(config, f"metrics.extra.{name}") if name.isidentifier() else None
    extra = {name: entry} if isinstance(entry, str | Mapping) else {}
    with suppress(UserError):  # which the job itself will say
        extra = with_modes(extra)
    return f"{mode_of(objective, extra)}imize"


def worst(direction: str) -> float:
    """The objective that no sweeper takes for a success."""
    return -math.inf if direction == "maximize" else math.inf


def what_varies(config: DictConfig) -> tuple[list[str], int]:
    """Keys that a multirun varies, and its jobs: 0 if their number cannot be known beforehand."""
    sweeper = config.hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    values: dict[str, int] = {}
    for override in OverridesParser.create().parse_overrides(
        [*params, *config.hydra.overrides.task]
    ):
        # The command has the last word over the parameters.
        values.pop(override.key_or_group, None)
        if override.is_discrete_sweep():
            values[override.key_or_group] = len(list(override.sweep_string_iterator()))
        elif override.is_sweep_override():
            values[override.key_or_group] = 0
    return list(values), int(sweeper.get("n_trials") or math.prod(values.values()))


class SweepCallback(Callback):
    """Holds the sweep's directory while Hydra works on it."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def __reduce__(self) -> tuple[Any, ...]:
        # Launchers send it to their workers; the hold stays here.
        return SweepCallback, ()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the directory, and tell the jobs which attempt they belong to."""
        if not membership.is_first():
            return  # the first rank holds the directory for all of them
        directory = Path(config.hydra.sweep.dir).absolute()
        attempt = uuid.uuid4().hex
        swept, jobs = what_varies(config)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(hold(directory, config.in_use))
            Ledger(directory).begin(
                attempt,
                jobs=jobs,
                objective=config.objective,
                direction=direction(config.hydra.sweeper, config),
                swept=swept,
            )
            if config.trainer.precision == AUTO:
                measure(config.trainer.accelerator)  # once, before its jobs keep the device busy
        except (UserError, OSError) as error:
            # Hydra turns an exception of a callback into a warning, and goes on.
            sys.exit(f"error: {explain(error)}")
        os.environ |= {SWEEP: str(directory), ATTEMPT: attempt}
        if "submitit" in str(config.hydra.launcher.get("_target_")):
            # Its jobs print into files of their own, and it waits for the last of them.
            threading.Thread(target=_tell, args=(directory, attempt), daemon=True).start()
        sampler = config.hydra.sweeper.get("sampler")
        if sampler is not None and "seed" in sampler and sampler.seed is None:
            print(
                "this sweep cannot be resumed: set hydra.sweeper.sampler.seed, so that the same "
                "command tries the same values again",
                file=sys.stderr,
            )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Let go of the directory; after a failure it is let go as the process ends."""
        self._held.close()


def _tell(directory: Path, attempt: str) -> None:
    """Print how far a sweep has come whenever a job has begun or ended; ends with the process."""
    ledger, size = Ledger(directory), -1
    with suppress(OSError, UserError):  # of a directory that is gone nothing is left to say
        while True:
            if (now := ledger.path.stat().st_size) != size:
                size = now
                print(sweep_table.line(directory, attempt), flush=True)
            time.sleep(POLL)


def current_sweep() -> tuple[Path, dict[int, Entry]] | None:
    """Directory and jobs of the sweep that this process works on; None if there is none."""
    if SWEEP not in os.environ:
        return None
    directory = Path(os.environ[SWEEP])
    return directory, Ledger(directory).newest(os.environ[ATTEMPT])
