"""Who this process is among ranks: one of torchrun's, of SLURM's srun, of our own, or alone.

Ranks of our own are children of `equiloss.launching.ranks`, and read the configuration that it
resolved. A rank of another launcher
composes its configuration by itself. Before anything else such ranks compare its hash, so that they
never train together on different configurations, and agree on the first rank's directory.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from equiloss.config import TrainerConfig
from equiloss.distributed import joining
from equiloss.errors import ConfigError

# The variables by which a process is known to be one of several.
COUNTED_BY = {"torchrun": "TORCHELASTIC_RUN_ID", "srun": "SLURM_STEP_NUM_TASKS"}
# In the environment of a rank that `equiloss.launching.ranks` started.
CHILD = "EQUILOSS_RANK"


@dataclass(frozen=True)
class Membership:
    """This process's place among the ranks that another launcher has started."""

    launcher: str
    """torchrun | srun."""
    rank: int
    world_size: int
    local_rank: int
    """Number of the rank on its machine."""
    local_world_size: int
    """Ranks on this machine."""


@cache  # Lightning removes some of the variables at the end of a fit
def external() -> Membership | None:
    """This process's place among the ranks of torchrun or srun; None if neither started it.

    An allocation of SLURM is not enough: in the script of a batch job this process is alone, and
    starts its ranks itself. Only srun counts the tasks of a step.
    """
    variables = os.environ
    if COUNTED_BY["torchrun"] in variables:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Membership("torchrun", *(int(variables[name]) for name in names))
    tasks = int(variables.get(COUNTED_BY["srun"], 1))
    if tasks > 1:
        nodes = int(variables.get("SLURM_STEP_NUM_NODES", 1))
        rank, local = (int(variables[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
        return Membership("srun", rank, tasks, local, tasks // nodes)
    return None


def ranks_asked_for(config: TrainerConfig) -> int:
    """Ranks that a configuration asks for."""
    if config.devices != -1:
        return config.devices
    import torch

    return max(torch.cuda.device_count(), 1)


def ranks_here() -> int:
    """Ranks on this machine, this one among them; those of our own are all on one."""
    if group := external():
        return group.local_world_size
    return int(os.environ["WORLD_SIZE"]) if CHILD in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for its group: rank 0, or alone."""
    group = external()
    return group is None or group.rank == 0


def quieten_hydra(arguments: list[str]) -> None:
    """Have Hydra leave no log and no directory of ranks other than the first.

    Args:
        arguments: The command line's, changed in place.
    """
    if not is_first():
        arguments += ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=."]


def join(config: TrainerConfig) -> None:
    """Be one of a process group of another launcher's ranks, until this process ends.

    Raises:
        ConfigError: if `trainer.devices` is another number than that of the ranks, or if some of
            them do not come.
    """
    group = external()
    if group is None:
        return
    import torch.distributed as dist

    if config.devices not in (group.world_size, -1):
        raise ConfigError(
            f"{group.launcher} started {group.world_size} ranks, and trainer.devices is "
            f"{config.devices}: set trainer.devices={group.world_size}, or leave {group.launcher} "
            "out (train.py starts ranks itself)"
        )
    if group.launcher == "srun":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        # Not a port that another step, or job, of the same node would take.
        job, step = (int(os.environ.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
        os.environ |= {
            "RANK": str(group.rank),
            "WORLD_SIZE": str(group.world_size),
            "LOCAL_RANK": str(group.local_rank),
            "NODE_RANK": str(group.rank // group.local_world_size),
            "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(nodes),
            "MASTER_PORT": str(15000 + (7 * job + step) % 10000),
        }
    if dist.is_initialized():
        return  # by an earlier job of the sweep: the ranks are the same
    store = joining.meet(
        group.rank,
        group.world_size,
        launcher=group.launcher,
        way_out=f"without them, unset {COUNTED_BY[group.launcher]}",
        seconds=config.rank_timeout_s,
    )
    dist.init_process_group(
        # What ranks agree on travels between CPUs, whatever trains.
        "gloo" if config.accelerator == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("equiloss/group", store),  # type: ignore[attr-defined]
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=config.rank_timeout_s),
    )


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank of another launcher; alone, the value itself."""
    if external() is None:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_same_config(config_hash: str) -> None:
    """Compare the configurations that the ranks of another launcher have composed.

    Raises:
        ConfigError: on every rank, if they are not all the same, naming the ranks.
    """
    if external() is None:
        return
    from equiloss.distributed import collectives

    hashes = collectives.gather_objects(config_hash)
    others = [str(rank) for rank, own in enumerate(hashes) if own != hashes[0]]
    if others:
        raise ConfigError(
            f"rank {', '.join(others)} composed another configuration than rank 0: every rank "
            "must be given the same overrides"
        )


def leave(code: int) -> None:
    """End this rank at once: the others may be waiting for it in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
