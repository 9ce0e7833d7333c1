"""How ranks that another launcher has started find each other.

torch's own rendezvous waits in code that no signal reaches, and does not say for whom.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING

from equiloss.errors import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

# Until the first rank answers, and between two looks at who has come.
TRY_SECONDS = 1.0
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10.0


def meet(rank: int, world_size: int, *, launcher: str, way_out: str, seconds: float) -> TCPStore:
    """Wait until every rank is there.

    Args:
        rank: This one.
        world_size: Ranks that were started.
        launcher: Who has started them, for messages.
        way_out: What to do where the others are not to come.
        seconds: How long to wait.

    Returns:
        The store at MASTER_ADDR and MASTER_PORT, for `init_process_group`.

    Raises:
        ConfigError: if some do not come, naming them.
    """
    began, told = time.monotonic(), False
    store: TCPStore | None = None
    missing = list(range(world_size))
    while missing:
        if store is None:
            store = _connected(rank)
            if store is not None:
                store.set(f"equiloss/{rank}", "here")
        if store is not None:
            missing = [other for other in missing if not store.check([f"equiloss/{other}"])]
        waited = time.monotonic() - began
        names = ", ".join(map(str, missing if store is not None else [0]))
        whom = f"rank {names} of the {world_size} that {launcher} has started"
        if missing and waited > seconds:
            raise ConfigError(f"{whom} did not come within {seconds:g} s: {way_out}")
        if missing and waited > PATIENCE_SECONDS and not told:
            told = True
            print(f"rank {rank} waits for {whom}: {way_out}", file=sys.stderr, flush=True)
        if missing:
            time.sleep(POLL_SECONDS)
    assert store is not None
    return store


def _connected(rank: int) -> TCPStore | None:
    """The store, or None while the first rank does not answer."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent has one of its own there.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        if not hosts:
            # torch would print a page about each try.
            socket.create_connection((address, port), TRY_SECONDS).close()
        return TCPStore(address, port, is_master=hosts, wait_for_workers=False, multi_tenant=True)
    except (OSError, DistError) as error:
        if hosts:
            raise ConfigError(
                f"the first rank cannot listen at {address}:{port} (MASTER_ADDR, MASTER_PORT)"
            ) from error
        return None
