"""Real process groups on this machine, for tests and proofs: a function called on every rank."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

JOIN_SECONDS = 60
# For the end of a rank to be seen that took others down with it.
GRACE_SECONDS = 1.0


class RankEndedError(RuntimeError):
    """A rank of `run_ranks` raised or died.

    Args:
        rank: Its number.
        trace: Its traceback; empty where it died without a word.
    """

    def __init__(self, rank: int, trace: str = "") -> None:
        how = f"failed:\n{trace}" if trace else "died without a word"
        super().__init__(f"rank {rank} {how}")
        self.rank = rank
        self.trace = trace


def run_ranks(function: Callable[..., _T], world_size: int, *args: Any) -> list[_T]:
    """Call `function(*args)` on every rank of a real gloo process group.

    Args:
        function: Importable by name (a function of a module); it may use torch.distributed.
        world_size: Ranks. Each is a process of its own, 1 included.
        *args: Arguments, the same on every rank; they are pickled.

    Returns:
        What the function returned on each rank, in rank order; pickled too.

    Raises:
        RankEndedError: if a rank raises or dies, with that rank's traceback; the others are ended.

    >>> from equiloss.distributed import collectives
    >>> run_ranks(collectives.world_size, 2)
    [2, 2]
    """
    # A server that has imported torch once, and has no threads, forks ranks quickly and safely.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", function.__module__])
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                # Not a daemon, which might not start loader workers.
                target=_rank,
                args=(send, store, rank, world_size, function, args),
            )
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, send in pipes:
            send.close()
        try:
            return _collect([receive for receive, _ in pipes])
        finally:
            for process in processes:
                process.kill()
                process.join()


def _check_others(pipes: list[Connection], heard: set[int]) -> None:
    """Raise if a rank died: the others then fail at once, and may be heard first."""
    others = [pipe for rank, pipe in enumerate(pipes) if rank not in heard]
    for pipe in wait(others, GRACE_SECONDS):
        assert isinstance(pipe, Connection)
        try:
            pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise RankEndedError(pipes.index(pipe)) from None


def _collect(pipes: list[Connection]) -> list[Any]:
    """Every rank's result in rank order, or the failure that came first."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results])
        failures = []
        for rank in (rank for rank, pipe in enumerate(pipes) if pipe in ready):
            try:
                succeeded, value, moment = pickle.loads(pipes[rank].recv_bytes())
            except (EOFError, ConnectionResetError):
                # A rank that dies takes the others' connections with it: it was before them.
                raise RankEndedError(rank) from None
            if succeeded:
                results[rank] = value
            else:
                failures.append((moment, rank, value))
        if failures:
            _check_others(pipes, {rank for _, rank, _ in failures} | set(results))
            _, rank, value = min(failures)
            raise RankEndedError(rank, value)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    store: Path,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    # The ranks share this machine's cores: one thread each.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=JOIN_SECONDS),
        )
        # Never fall through to a smaller group.
        assert dist.get_world_size() == world_size
        _send(pipe, True, function(*args))
        dist.barrier()
    except Exception:  # the caller gets the traceback
        _send(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
    os._exit(0)


def _send(pipe: Connection, succeeded: bool, value: Any) -> None:
    # By value: multiprocessing would share a tensor's memory, which ends with this process.
    pipe.send_bytes(pickle.dumps((succeeded, value, time.monotonic())))
