"""The ranks of one job: started as plain modules, watched, and ended together.

All ranks, the first included, are children of the process that composed the configuration. Each
reads the run directory's resolved `config.yaml`, never the command line. Rendezvous variables
are set in the children's environment only. (A first rank inside the Hydra process would wait
for a rank that died before joining until the timeout, and pass its broken group on to the next
job.)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from equiloss.distributed import membership
from equiloss.errors import UserError
from equiloss.imports import import_target
from equiloss.launching.slots import cores
from equiloss.records.run_dir import CONFIG, RANKS, rank_error, rank_log

POLL_SECONDS = 0.05
# Time for the other ranks to say what they saw, once one has failed.
GRACE_SECONDS = 0.5
INTERRUPT_SECONDS = 5.0
INTERRUPTED = 130


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
    threads: int | None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Start the ranks of a run and wait for them.

    Args:
        run_dir: Holds `config.yaml`; the ranks' own output goes to `ranks/` in it.
        run: package.module:function that each of them calls.
        world_size: Ranks to start.
        threads: CPU threads of each rank; None divides the cores among them.
        variables: Further variables of the ranks' environment.

    Raises:
        RankError: if a rank fails; the others are ended, and the message is the failed rank's.
        KeyboardInterrupt: if the user interrupts, after the ranks have ended.
    """
    (run_dir / RANKS).mkdir(exist_ok=True)
    if not (run_dir / RANKS).is_symlink():
        # Of an attempt that this one continues, on other ranks maybe.
        for stale in (run_dir / RANKS).glob("rank*.*"):
            stale.unlink()
    environment = _environment(world_size, threads) | dict(variables or {})
    ranks = [_start(run_dir, run, rank, environment) for rank in range(world_size)]
    try:
        while any(rank.running for rank in ranks):
            if any(rank.failed for rank in ranks):
                _wait(ranks, GRACE_SECONDS)
                break
            time.sleep(POLL_SECONDS)
        cause = _cause(ranks, run_dir)
    except KeyboardInterrupt:
        # Ranks are in sessions of their own, so that each gets the signal exactly once: from
        # here, whether a terminal, a scheduler or a person sent it to this process.
        for rank in ranks:
            if rank.running:
                rank.process.send_signal(signal.SIGINT)
        _wait(ranks, INTERRUPT_SECONDS)
        raise
    finally:
        for rank in ranks:
            rank.end()
    if cause is not None:
        if any(rank.process.returncode == INTERRUPTED for rank in ranks):
            raise KeyboardInterrupt
        raise cause


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def end(self) -> None:
        if self.running:
            self.process.kill()
        self.process.wait()
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
    process = subprocess.Popen(
        [sys.executable, "-m", "equiloss.launching.ranks", str(run_dir), run],
        env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    if output is not None:
        output.close()
    return _Rank(number, process)


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
            return RankError(f"rank {rank.number} was killed by {signal.Signals(-code).name}")
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


def _end_with_parent() -> None:
    """End this rank when its supervisor ends, however it ends: its pipe then closes."""

    def watch() -> None:
        # Not sys.stdin: its lock, held while it waits, would be copied into forked loader
        # workers, which close their stdin and would wait for it for ever.
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    descriptor = sys.stdin.fileno()

    threading.Thread(target=watch, daemon=True).start()


def _main(run_dir: Path, run: str) -> int:
    """Run one rank; returns the exit code."""
    number = int(os.environ["LOCAL_RANK"])
    _end_with_parent()
    try:
        import logging

        from omegaconf import DictConfig, OmegaConf

        from equiloss.config.resolved import resolve

        logging.basicConfig(
            level=logging.INFO if number == 0 else logging.WARNING,
            format="[%(levelname)s] %(name)s: %(message)s",
        )
        stored = OmegaConf.load(run_dir / CONFIG)
        assert isinstance(stored, DictConfig)
        import_target(run, "run", UserError)(resolve(stored), run_dir)
    except (KeyboardInterrupt, SystemExit):
        return INTERRUPTED
    except Exception as error:  # the supervisor reports it, whatever it is
        own_words = isinstance(error, UserError)
        word = {
            "time": time.time(),
            "message": str(error) if own_words else f"{type(error).__name__}: {error}",
            # A user's mistake is the same mistake on every rank.
            "everywhere": own_words,
            "trace": traceback.format_exc(),
        }
        rank_error(run_dir, number).write_text(json.dumps(word), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    code = _main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group whose other ranks are gone may wait for them while it closes.
    os._exit(code)
