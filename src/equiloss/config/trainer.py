"""`trainer=…`: devices, precision and length of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from equiloss.config.checks import finite, open_dict, positive, require
from equiloss.errors import choose

PRECISIONS = (
    *("64-true", "32-true", "bf16-true", "16-true"),
    *("bf16-mixed", "16-mixed"),
)

# In the place of a precision: what the device is fast in (see `equiloss.launching.precision`).
AUTO = "auto"

# Arguments of Lightning's Trainer that would break "the same number", or that have a key here.
REFUSED_TRAINER_ARGUMENTS = {
    "gradient_clip_val": "set optimizer.gradient_clip_norm, which clips the synchronised gradient",
    "gradient_clip_algorithm": "set optimizer.gradient_clip_norm",
    "accumulate_grad_batches": "set trainer.micro_batch_size, which keeps the loss of the whole "
    "global batch (accumulating means changes it)",
    "use_distributed_sampler": "data.batch_size is global and split without padding",
    "sync_batchnorm": "it follows from the model and the devices",
    "strategy": "it follows from trainer.devices",
    "num_nodes": "a run uses the devices of one machine",
    "num_sanity_val_steps": "the parity check and the set-up checks run before the first step",
    "overfit_batches": "use debug=overfit",
    "fast_dev_run": "use debug=fast",
    "limit_train_batches": "set data.max_samples",
    "limit_val_batches": "set data.max_samples",
    "limit_test_batches": "set data.max_samples",
    "reload_dataloaders_every_n_epochs": "the order of samples is a function of seed and epoch",
    "barebones": "it turns off the logs that prove the guarantee",
    "inference_mode": "evaluation always runs without autograd",
    "logger": "choose a file of conf/logger",
    "callbacks": "choose a file of conf/callbacks",
    "plugins": "checkpoints go through equiloss.training.checkpoint",
    "default_root_dir": "set hydra.run.dir",
    "enable_checkpointing": "set checkpoint.every_n_steps",
    "enable_progress_bar": "set progress_bar",
    "enable_model_summary": "set model_summary",
}


@dataclass
class TrainerConfig:
    """Devices, precision and length. `+trainer.<argument>` goes to Lightning's Trainer as it is."""

    accelerator: str = "cpu"
    """cpu | gpu | auto, or another accelerator of Lightning (not tpu)."""
    devices: int = 1
    """Ranks; more than one makes a real process group (-1: every visible GPU)."""
    threads: int | None = None
    """CPU threads of each rank (null: the cores divided among the ranks)."""
    precision: str = "32-true"
    """64-true | 32-true | bf16-mixed | 16-mixed (GPU only) | bf16-true | 16-true | auto: bf16-mixed
    where the device is faster in it, else 32-true; a run keeps what it began with."""
    max_epochs: int | None = 15
    """Passes over the training split (null: max_steps alone decides)."""
    max_steps: int | None = None
    """Optimizer steps (null: max_epochs alone decides)."""
    rank_timeout_s: float = 300.0
    """Seconds without a sign of life after which a rank fails the run; under torchrun and srun,
    seconds that ranks wait for each other."""
    max_time: str | None = None
    """Longest time that one attempt trains, DD:HH:MM:SS; the run is then interrupted, and goes on
    when its command is given again (null: no limit)."""
    micro_batch_size: int | None = None
    """Largest number of samples per forward pass of a rank (null: its whole slice)."""
    reduction: str = "sum"
    """sum | bitwise: whether results on other numbers of devices are equal up to rounding, or to
    the bit (slower: see docs/bitwise.md)."""
    shards: int = 8
    """With reduction=bitwise: virtual shards of a global batch, a power of two; at most as many
    devices can share the work, and results depend on it."""
    deterministic: bool = False
    """Refuse non-deterministic kernels."""
    log_every_n_steps: int = 1
    """Write training scalars every so many steps."""
    arguments: dict[str, Any] = field(default_factory=open_dict)
    """Arguments of Lightning's Trainer, put here from `+trainer.<argument>`."""

    def __post_init__(self) -> None:
        require(
            self.devices > 0 or self.devices == -1,
            f"trainer.devices must be positive, or -1 for every visible GPU; got {self.devices}",
        )
        whole = ("threads", "max_epochs", "max_steps", "micro_batch_size", "log_every_n_steps")
        for key in (*whole, "rank_timeout_s"):
            positive(f"trainer.{key}", getattr(self, key))
        finite("trainer.rank_timeout_s", self.rank_timeout_s)
        require(
            self.max_time is None or re.fullmatch(r"\d+(:\d\d){3}", self.max_time) is not None,
            f"trainer.max_time is written DD:HH:MM:SS, such as 00:12:00:00; got {self.max_time}",
        )
        choose("trainer.precision", self.precision, (*PRECISIONS, AUTO))
        choose("trainer.reduction", self.reduction, ("sum", "bitwise"))
        if self.reduction == "bitwise":
            self._check_bitwise()
        for name in self.arguments:
            reason = REFUSED_TRAINER_ARGUMENTS.get(name)
            require(reason is None, f"trainer.{name} is refused: {reason}")
        require(
            isinstance(self.arguments.get("profiler"), str | None),
            "+trainer.profiler is the name of one of Lightning's, such as simple; or profile=true",
        )
        require(
            self.accelerator != "tpu",
            "trainer.accelerator=tpu is refused: its ranks sum by a strategy of their own, with "
            "which nothing was measured; take cpu, gpu or auto",
        )
        require(
            not (self.accelerator == "cpu" and self.precision == "16-mixed"),
            "trainer.precision=16-mixed needs a GPU (on a CPU it silently runs as bfloat16): "
            "use bf16-mixed or 32-true",
        )
        require(
            not (self.max_epochs is None and self.max_steps is None),
            "set trainer.max_epochs or trainer.max_steps: one of them must end the run",
        )

    def _check_bitwise(self) -> None:
        why = "trainer.reduction=bitwise"
        require(
            self.shards > 0 and self.shards & (self.shards - 1) == 0,
            f"trainer.shards must be a power of two, got {self.shards}",
        )
        require(
            self.micro_batch_size is None,
            f"{why} has micro-batches of its own, the shards: leave trainer.micro_batch_size out, "
            "and set trainer.shards for smaller ones",
        )
        require(
            self.devices <= self.shards,
            f"{why} shares {self.shards} shards, and trainer.devices is {self.devices}: set "
            "trainer.shards to a power of two that is as large",
        )
        require(
            self.precision not in ("16-mixed", "16-true"),
            f"{why} does not scale gradients: trainer.precision={self.precision} would lose small "
            "ones; use bf16-mixed or 32-true",
        )

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        if self.max_time is None:
            return None
        days, hours, minutes, seconds = map(int, self.max_time.split(":"))
        return seconds + 60.0 * (minutes + 60 * (hours + 24 * days))

    @property
    def cpu_threads(self) -> int | None:
        """CPU threads of each rank; None divides the cores among the ranks.

        One and two threads add in different orders, so bits need a number that does not depend on
        the ranks.
        """
        return 1 if self.threads is None and self.reduction == "bitwise" else self.threads
