"""One job's part in a sweep: how it is noted in the ledger, and how its failure is shown."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from equiloss.distributed import membership
from equiloss.launching import ranks, sweep_table
from equiloss.launching.composition_errors import explain
from equiloss.launching.sweep import direction, worst
from equiloss.records.ledger import ATTEMPT, Ledger

# What the user wants of HYDRA_FULL_ERROR, which is set for Hydra: in other processes too.
TRACEBACKS = "EQUILOSS_TRACEBACK"


class Job:
    """This job's part in a sweep; of a single run nothing is noted."""

    def __init__(self, config: DictConfig, run: str) -> None:
        self.run = run
        hydra = HydraConfig.get()
        self.direction = direction(hydra.sweeper, config)
        self.began = time.monotonic()
        self.in_sweep = hydra.mode == RunMode.MULTIRUN
        if self.in_sweep:
            self.sweep_dir = Path(hydra.sweep.dir).absolute()
            self.directory = os.path.relpath(hydra.runtime.output_dir, self.sweep_dir)
            self.number = int(hydra.job.num)
            self.overrides = list(hydra.overrides.task)

    @property
    def worst(self) -> float:
        """The objective of a job that failed."""
        return worst(self.direction)

    def note(self, status: str, **details: Any) -> None:
        """Tell the sweep how this job is doing."""
        if self.in_sweep and membership.is_first():
            details["overrides"] = self.overrides
            if status != "running":
                details["seconds"] = time.monotonic() - self.began
            Ledger(self.sweep_dir).add(self.number, self.directory, status, **details)
            if status != "running":
                print(sweep_table.line(self.sweep_dir, os.environ.get(ATTEMPT, "")), flush=True)

    def report(self, error: Exception) -> None:
        """Print what ended this job."""
        line = f"job {self.number}: {explain(error)}" if self.in_sweep else explain(error)
        if os.environ.get(TRACEBACKS) == "1":
            print(trace(error), file=sys.stderr)
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"error: {line}{notes}", file=sys.stderr, flush=True)


def trace(error: Exception) -> str:
    """The traceback; of the rank's own error where it happened in a rank."""
    if isinstance(error, ranks.RankError) and error.trace:
        return error.trace
    return "".join(traceback.format_exception(error))
