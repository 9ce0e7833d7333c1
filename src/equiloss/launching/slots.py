"""Cores and GPUs of this machine, divided among jobs that run at the same time.

Launchers such as joblib's and submitit's local one start several jobs at once, and none knows of
the others. Each core and each GPU of a machine has a lock file in the sweep directory; a job holds
as many as it needs, or waits until it can.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig

from equiloss.config import Config, TrainerConfig
from equiloss.config.sweep import AUTO
from equiloss.distributed import membership
from equiloss.errors import ConfigError
from equiloss.launching.lock import NoLocksError, lock

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"
# In the environment of a job that `equiloss.launching.forks` started: how many run at once.
AT_ONCE = "EQUILOSS_JOBS_AT_ONCE"


def parallel_jobs(hydra: HydraConf, jobs: int) -> int:
    """How many jobs of a sweep the launcher may run on this machine at the same time.

    Args:
        hydra: Hydra's own configuration.
        jobs: Jobs of the sweep, 0 if that is unknown.
    """
    if hydra.mode != RunMode.MULTIRUN:
        return 1
    launcher = str(hydra.launcher.get("_target_", ""))
    if "joblib" in launcher:
        wanted = int(hydra.launcher.n_jobs)
        wanted = wanted if wanted > 0 else len(cores())
    elif "submitit" in launcher and "Local" in launcher:
        # It starts every job of a batch at once.
        wanted = max(jobs, 1)
    elif launcher.endswith(".RayLauncher"):
        # As many as its number of processors (1 by default) lets it.
        each = hydra.launcher.ray.remote.get("num_cpus") or 1
        wanted = max(int(len(cores()) / each), 1)
    else:
        # SLURM divides the machine itself; a fork of the basic launcher knows of the others.
        return int(os.environ.get(AT_ONCE, 1))
    return min(wanted, jobs) if jobs else wanted


def at_once(config: Config | DictConfig) -> int:
    """How many jobs `sweep.parallel` lets run at the same time.

    Args:
        config: Typed, or as Hydra composed it: `sweep` and `trainer` are read.
    """
    if config.sweep.parallel != AUTO:
        return int(config.sweep.parallel)
    ranks = membership.ranks_asked_for(config.trainer)
    gpus = _gpus() if config.trainer.accelerator != "cpu" else []
    if gpus:
        return max(len(gpus) // ranks, 1)
    return max(len(cores()) // (ranks * (config.trainer.threads or 1)), 1)


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def share(
    directory: Path, config: TrainerConfig, parallel: int, in_use: str = "refuse"
) -> Iterator[dict[str, str]]:
    """Hold this job's part of the machine while the context lasts.

    Args:
        directory: The sweep's, where the lock files are; machines may share it.
        config: How many devices of which kind the job needs, and how many threads.
        parallel: Jobs that may run at the same time; with 1 there is nothing to divide.
        in_use: unlocked: where the file system has no locks, divide nothing.

    Yields:
        Variables of the environment for the job's ranks.

    Raises:
        ConfigError: if the job needs more GPUs than there are.
        NoLocksError: if the file system has no locks.
    """
    if parallel == 1:
        yield {}
        return
    devices = membership.ranks_asked_for(config)
    everywhere = cores()
    each = (config.cpu_threads or 0) * devices or max(len(everywhere) // parallel, devices)
    gpus = _gpus() if config.accelerator != "cpu" else []
    if gpus and devices > len(gpus):
        raise ConfigError(f"trainer.devices={devices}, and {len(gpus)} GPUs are visible")
    with ExitStack() as held:
        folder = directory / ".slots" / platform.node()
        names = [f"core{core}" for core in everywhere]
        try:
            mine = _take(folder, names, min(each, len(names)), held)
        except NoLocksError:
            if in_use != "unlocked":
                raise
            log.warning("the file system of %s has no locks: jobs share all cores and GPUs", folder)
            yield {}
            return
        variables = {}
        if gpus:
            graphics = _take(folder, [f"gpu{gpu}" for gpu in gpus], devices, held)
            variables[VISIBLE] = ",".join(name.removeprefix("gpu") for name in graphics)
        if hasattr(os, "sched_setaffinity"):
            # The ranks inherit it.
            os.sched_setaffinity(0, {int(name.removeprefix("core")) for name in mine})
            held.callback(os.sched_setaffinity, 0, everywhere)
        yield variables


def _take(folder: Path, names: Sequence[str], count: int, held: ExitStack) -> list[str]:
    """Lock so many of the names, all at once or none; wait while others have them."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with (folder / "turn").open("a") as turn:
            lock(turn, wait=True)
            taken: dict[str, TextIOWrapper] = {}
            for name in names:
                file = (folder / name).open("a")
                if not lock(file):
                    file.close()
                    continue
                taken[name] = file
                if len(taken) == count:
                    for file in taken.values():
                        held.enter_context(file)
                    return list(taken)
            for file in taken.values():
                file.close()
        time.sleep(POLL_SECONDS)


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
