"""`trainer.precision=auto`: what a device is fast in, decided once for a run and stored with it."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from equiloss.config.resolved import ResolvedConfig, from_stored, resolve
from equiloss.config.trainer import AUTO
from equiloss.distributed import membership
from equiloss.records.reading import read_yaml
from equiloss.records.run_dir import CONFIG

# Rows of the square matrices: enough to keep a device busy, and soon multiplied.
ROWS = {"cpu": 256, "else": 4096}
ROUNDS = 3
# The part of float32's time that bfloat16 must stay below to be worth its digits. With
# instructions of its own it takes a half or less, and without them more than float32.
WORTH = 0.75


def settled(resolved: ResolvedConfig, run_dir: Path) -> ResolvedConfig:
    """A configuration with a precision in the place of `auto`.

    It is that of the run which the directory holds, on whatever device that began; else
    bf16-mixed where bfloat16 is faster than float32 here, and 32-true where it is not. The first
    rank decides, and says so. Losses are float32 in either case.

    Raises:
        RecordError: if the run's own configuration cannot be read.
    """
    if resolved.config.trainer.precision != AUTO:
        return resolved
    chosen, why = membership.from_first_rank(_of_run(run_dir) or _of_device(resolved))
    if membership.is_first():
        print(f"trainer.precision=auto: {chosen} ({why})", flush=True)
    trainer = {**resolved.plain["trainer"], "precision": chosen}
    return resolve(OmegaConf.create({**resolved.plain, "trainer": trainer}))


def _of_run(run_dir: Path) -> tuple[str, str] | None:
    if not (run_dir / CONFIG).exists():
        return None
    stored = from_stored(read_yaml(run_dir / CONFIG))
    return None if stored is None else (stored["trainer"]["precision"], "as this run began")


def _of_device(resolved: ResolvedConfig) -> tuple[str, str]:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    elsewhere = resolved.config.trainer.accelerator != "cpu" and found is not None
    device = str(found) if elsewhere else "cpu"
    ratio = bfloat16_over_float32(device)
    chosen = "bf16-mixed" if ratio < WORTH else "32-true"
    return chosen, f"bfloat16 takes {ratio:.2f} of float32's time on this {device}"


@cache  # the jobs of a sweep ask again
def bfloat16_over_float32(device: str) -> float:
    """Time of a product of two matrices in bfloat16 over its time in float32, the shortest of 3."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows = ROWS["cpu" if device == "cpu" else "else"]
        matrix = torch.ones(rows, rows, dtype=dtype, device=device)
        times = []
        for _ in range(1 + ROUNDS):  # the first also makes what the others find
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
