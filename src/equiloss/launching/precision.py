"""`trainer.precision=auto`: what a device is fast in, decided once for a run and stored with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from equiloss.config import PRECISIONS
from equiloss.config.resolved import ResolvedConfig, from_stored, resolve
from equiloss.config.trainer import AUTO
from equiloss.distributed import membership
from equiloss.errors import ConfigError
from equiloss.launching.resume import is_completed
from equiloss.records.reading import read_yaml
from equiloss.records.run_dir import CONFIG, has_state

# What was measured, for the jobs of a sweep: they are compared, and so of one precision.
MEASURED = "EQUILOSS_BFLOAT16"
# Rows of the square matrices: enough to keep a device busy, and soon multiplied.
ROWS = {"cpu": 256, "else": 4096}
ROUNDS = 3
# The part of float32's time that bfloat16 must stay below to be worth its digits. With
# instructions of its own it takes a half or less, and without them more than float32.
WORTH = 0.75


class Measured(NamedTuple):
    """How fast a device is in bfloat16."""

    accelerator: str
    """As `trainer.accelerator`."""
    device: str
    ratio: float
    """Time of a product of two matrices over its time in float32."""


def settled(resolved: ResolvedConfig, run_dir: Path) -> ResolvedConfig:
    """A configuration with a precision in the place of `auto`.

    It is that of the run which goes on in the directory, on whatever device that began; else
    bf16-mixed where bfloat16 is faster than float32 here, and 32-true where it is not. The first
    rank decides, and says so. Losses are float32 in either case.

    Raises:
        RecordError: if the run's own configuration cannot be read.
        ConfigError: if the device cannot be measured.
    """
    if resolved.config.trainer.precision != AUTO:
        return resolved
    decided = None
    if membership.is_first():
        decided = _of_run(run_dir) or _of_device(resolved.config.trainer.accelerator)
    chosen, why = membership.from_first_rank(decided)
    if membership.is_first():
        print(f"trainer.precision=auto: {chosen} ({why})", flush=True)
    trainer = {**resolved.plain["trainer"], "precision": chosen}
    return resolve(OmegaConf.create({**resolved.plain, "trainer": trainer}))


def _of_run(run_dir: Path) -> tuple[str, str] | None:
    if not (has_state(run_dir) or is_completed(run_dir)):
        return None
    stored = from_stored(read_yaml(run_dir / CONFIG)) or {}
    trainer = stored.get("trainer")
    precision = trainer.get("precision") if isinstance(trainer, Mapping) else None
    return (precision, "as this run began") if precision in PRECISIONS else None


def _of_device(accelerator: str) -> tuple[str, str]:
    measured = measure(accelerator)
    chosen = "bf16-mixed" if measured.ratio < WORTH else "32-true"
    return chosen, f"bfloat16 takes {measured.ratio:.2f} of float32's time on {measured.device}"


def measure(accelerator: str) -> Measured:
    """Measure a device, unless that was done already for this process or the one it comes from.

    In a process that ends: this one then holds no device, and no threads that a fork would lack.

    Args:
        accelerator: As `trainer.accelerator`.

    Raises:
        ConfigError: if it cannot be measured.
    """
    known = os.environ.get(MEASURED, "").split()
    if len(known) != len(Measured._fields) or known[0] != accelerator:
        done = subprocess.run(
            [sys.executable, "-m", __name__, accelerator],
            capture_output=True,
            text=True,
            check=False,
        )
        known = done.stdout.split()
        if done.returncode or len(known) != len(Measured._fields):
            raise ConfigError(
                f"trainer.precision=auto: trainer.accelerator={accelerator} cannot be measured; "
                f"name one of {', '.join(PRECISIONS)}"
            )
        os.environ[MEASURED] = " ".join(known)
    return Measured(known[0], known[1], float(known[2]))


def bfloat16_over_float32(device: str) -> float:
    """Time of a product of two matrices in bfloat16 over its time in float32, the shortest of 3."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows = ROWS["cpu" if device == "cpu" else "else"]
        matrix = torch.ones(rows, rows, dtype=dtype, device=device)
        times = []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - began)
        return min(times[1:])  # the first made what the others found

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _main(accelerator: str) -> None:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    device = str(found) if accelerator != "cpu" and found is not None else "cpu"
    print(accelerator, device, repr(bfloat16_over_float32(device)))


if __name__ == "__main__":
    _main(sys.argv[1])
