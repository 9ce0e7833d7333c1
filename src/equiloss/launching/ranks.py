"""The ranks of one job: started as plain modules, watched, and ended together.

All ranks, the first included, are children of the process that composed the configuration. Each
(`equiloss.launching.rank`) reads the run directory's resolved `config.yaml`, never the command
line. Rendezvous variables are set in the children's environment only. (A first rank inside the
Hydra process would wait for a rank that died before joining until the timeout, and pass its broken
group on to the next job.)
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from equiloss.config import TrainerConfig
from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import BY_ANOTHER, Interrupted
from equiloss.errors import UserError
from equiloss.launching.pulse import PULSE, Pulse
from equiloss.launching.slots import cores
from equiloss.records.run_dir import RANKS, last_step, rank_error, rank_log

POLL_SECONDS = 0.05
# Time for the other ranks to say what they saw, once one has failed.
GRACE_SECONDS = 0.5
# Time in which a step is expected to end.
PATIENCE_SECONDS = 10.0
CLOSE_SECONDS = 60.0


class RankError(UserError):
    """A rank failed, and with it the job.

    Args:
        message: The cause, in the failed rank's own words.
        trace: The failed rank's traceback, where it left one.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def supervise(
    run_dir: Path,
    run: str,
    world_size: int,
    config: TrainerConfig,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Start the ranks of a run and wait for them.

    Args:
        run_dir: Holds `config.yaml`; the ranks' own output goes to `ranks/` in it.
        run: package.module:function that each of them calls.
        world_size: Ranks to start.
        config: CPU threads of each rank (None divides the cores among them), and after which
            silence one has failed.
        variables: Further variables of the ranks' environment.

    Raises:
        RankError: if a rank fails; the others are ended, and the message is the failed rank's.
        Interrupted: if this process or a rank gets a signal, after the ranks have ended.
    """
    (run_dir / RANKS).mkdir(exist_ok=True)
    if not (run_dir / RANKS).is_symlink():
        # Of an attempt that this one continues, on other ranks maybe.
        for stale in (run_dir / RANKS).glob("rank*.*"):
            stale.unlink()
    environment = _environment(world_size, config.cpu_threads) | dict(variables or {})
    ranks = [_start(run_dir, run, rank, environment) for rank in range(world_size)]
    try:
        with interruption.last_words(lambda: _kill(ranks)):
            _watch(ranks, run_dir, config.rank_timeout_s)
        cause = _cause(ranks, run_dir)
    finally:
        _end(ranks)
    if cause is not None:
        raise cause


def _watch(ranks: list[_Rank], run_dir: Path, timeout_s: float) -> None:
    """Wait for ranks that complete, or for one that fails.

    Raises:
        RankError: if one gives no sign of life for so long.
        Interrupted: as `supervise` does.
    """
    try:
        while any(rank.running for rank in ranks):
            if any(rank.failed for rank in ranks):
                _wait(ranks, GRACE_SECONDS)
                break
            time.sleep(POLL_SECONDS)
            for rank in ranks:
                _listen(rank, run_dir, timeout_s)
    except Interrupted as interrupted:
        # Ranks are in sessions of their own, so that each gets the signal exactly once: from
        # here, whether a terminal, a scheduler or a person sent it to this process.
        _stop(ranks, interrupted.number)
        if any(rank.failed for rank in ranks):
            raise
        return  # they have just completed
    if any(rank.process.returncode == BY_ANOTHER for rank in ranks):
        # The one that was asked closes its files.
        _wait(ranks, CLOSE_SECONDS)
    for asked in filter(None, [rank.interrupted for rank in ranks]):
        # The others stop after the same step, or find no one to go on with.
        _stop(ranks, asked.number)
        raise asked


def _listen(rank: _Rank, run_dir: Path, timeout_s: float) -> None:
    before = rank.pulse.silence
    rank.pulse.listen(POLL_SECONDS, rank.process.pid)
    silent = f"rank {rank.number} (process {rank.process.pid}) has given no sign of life for"
    if rank.running and rank.pulse.silence > timeout_s:
        raise RankError(
            f"{silent} {timeout_s:g} s, after step {last_step(run_dir)}: it is stopped, or its "
            "machine hangs (trainer.rank_timeout_s)"
        )
    if rank.running and before <= PATIENCE_SECONDS < rank.pulse.silence:
        print(f"{silent} {PATIENCE_SECONDS:g} s", file=sys.stderr, flush=True)


def _stop(ranks: list[_Rank], number: int | None) -> None:
    """Pass a signal on, and wait for the step under way to end."""
    for rank in ranks:
        if rank.running and number is not None:
            rank.process.send_signal(number)
    _wait(ranks, PATIENCE_SECONDS)
    if any(rank.running for rank in ranks):
        names = ", ".join(str(rank.number) for rank in ranks if rank.running)
        print(
            f"waiting for the step under way on rank {names}; a second signal ends it at once",
            file=sys.stderr,
            flush=True,
        )
        _wait(ranks, math.inf)


def _kill(ranks: list[_Rank]) -> None:
    """End ranks from a signal's handler: a wait may be under way, and must not begin again."""
    for rank in ranks:
        rank.process.kill()
    _wait(ranks, GRACE_SECONDS)


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        rank.end()


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    pulse: Pulse

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    @property
    def interrupted(self) -> Interrupted | None:
        """Why the rank stopped before its end, if it was asked to."""
        code = self.process.returncode or 0
        # One that does not train yet leaves a signal to the system.
        return interruption.of_code(128 - code if code < 0 else code)

    def end(self) -> None:
        if self.running:
            self.process.kill()
        self.process.wait()
        self.pulse.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _environment(world_size: int, threads: int | None) -> dict[str, str]:
    """What all ranks of a group have in common."""
    return {
        **os.environ,
        membership.CHILD: "1",
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        # Two pools of threads on the same cores make each many times slower.
        "OMP_NUM_THREADS": str(threads or max(len(cores()) // world_size, 1)),
        # What this process can import, the ranks can: a loss of the user's own, say.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _start(run_dir: Path, run: str, number: int, environment: Mapping[str, str]) -> _Rank:
    # The first rank talks to the user.
    output = None if number == 0 else rank_log(run_dir, number).open("wb")
    pulse = Pulse()
    own = {"RANK": str(number), "LOCAL_RANK": str(number), PULSE: str(pulse.sends)}
    process = subprocess.Popen(
        [sys.executable, "-m", "equiloss.launching.rank", str(run_dir), run],
        env={**environment, **own},
        pass_fds=[pulse.sends],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    if output is not None:
        output.close()
    pulse.started()
    return _Rank(number, process, pulse)


def _wait(ranks: list[_Rank], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(rank.running for rank in ranks) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _cause(ranks: list[_Rank], run_dir: Path) -> RankError | None:
    """What failed first, in the failed rank's own words; None if nothing did."""
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return None
    # A rank that was killed leaves no word, and makes the others fail with broken connections.
    for rank in failed:
        code = rank.process.returncode
        if code < 0 and code != -signal.SIGABRT:
            return RankError(f"rank {rank.number} was killed by {interruption.name_of(-code)}")
    words = []
    for rank in failed:
        file = rank_error(run_dir, rank.number)
        if file.is_file():
            words.append(json.loads(file.read_text(encoding="utf-8")) | {"rank": rank.number})
    if words:
        first = min(words, key=lambda word: word["time"])
        where = "" if first["everywhere"] else f"rank {first['rank']}: "
        return RankError(where + first["message"], first["trace"])
    rank = failed[0]
    log = rank_log(run_dir, rank.number)
    tail = log.read_text(errors="replace").strip().splitlines()[-3:] if log.is_file() else []
    code = rank.process.returncode
    return RankError("; ".join([f"rank {rank.number} exited with code {code}", *tail]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
