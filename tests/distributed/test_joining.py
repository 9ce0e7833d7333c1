"""Ranks of another launcher: found, named where they do not come, and never deaf."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from equiloss.distributed import interruption, joining
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import ConfigError


@pytest.fixture(autouse=True)
def _address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(joining, "PATIENCE_SECONDS", 0.1)


def meet(rank: int, seconds: float = 0.3) -> TCPStore:
    way_out = "without them, unset SOMETHING"
    return joining.meet(rank, 3, launcher="srun", way_out=way_out, seconds=seconds)


@pytest.mark.parametrize(("rank", "missing"), [(0, "1, 2"), (1, "0")])
def test_who_does_not_come_is_named(
    rank: int, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"rank {missing} of the 3 that srun has started"
    with pytest.raises(ConfigError, match=f"^{words} did not come within 0.3 s: without them"):
        meet(rank)
    assert capsys.readouterr().err == (
        f"rank {rank} waits for {words}: without them, unset SOMETHING\n"
    )


def test_ranks_that_come_late_are_waited_for() -> None:
    # The first rank's store answers the others until their group is there.
    with ThreadPoolExecutor() as ranks:
        second = ranks.submit(meet, 1, 20)
        time.sleep(0.2)
        first = ranks.submit(meet, 0, 20)
        stores = [meet(2, 20), first.result(10), second.result(10)]
    assert [store.check(["equiloss/2"]) for store in stores] == [True] * 3


def test_who_waits_hears_a_signal() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted), interruption.listening():
        meet(0, 20)
