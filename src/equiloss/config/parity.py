"""`parity=…`: how the formulations are held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

from equiloss.config.checks import require
from equiloss.errors import choose


@dataclass
class ParityConfig:
    """How often, and against what, the formulations are held to the oracle."""

    every_n_steps: int = 50
    """Check every so many steps, step 0 included (0: never)."""
    policy: str = "warn"
    """log | warn | raise: what a disagreement does."""
    formulations: list[str] = field(
        default_factory=lambda: ["softmax_nll", "log_softmax_nll", "cross_entropy"]
    )
    """Registered losses that must agree with the oracle."""

    def __post_init__(self) -> None:
        require(
            self.every_n_steps >= 0,
            f"parity.every_n_steps must be >= 0, got {self.every_n_steps}",
        )
        choose("parity.policy", self.policy, ("log", "warn", "raise"))
        require(
            len(set(self.formulations)) == len(self.formulations) > 0,
            f"parity.formulations needs distinct names, at least one; got {self.formulations}",
        )
