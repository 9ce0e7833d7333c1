"""`sweep.…`: how the jobs of a multirun are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from equiloss.config.checks import require

AUTO = "auto"


@dataclass
class SweepConfig:
    """How the jobs of a multirun are launched. What they compute does not depend on it."""

    parallel: Any = 1
    """Jobs at the same time with Hydra's own launcher, in forks of the sweep's process (auto: as
    many as this machine has cores or GPUs for). Cores and GPUs are shared out among them."""

    def __post_init__(self) -> None:
        whole = isinstance(self.parallel, int) and not isinstance(self.parallel, bool)
        require(
            self.parallel == AUTO or (whole and self.parallel > 0),
            f"sweep.parallel is a positive number of jobs, or auto; got {self.parallel}",
        )
