"""Signs of life of ranks: one that is stopped has none, one that computes for long has.

A limit on the time of a collective cannot tell a rank that is stopped from one that compiles,
validates or sits in a debugger. So each rank has a thread that writes a byte each second into a
pipe, and silence is counted in rounds of who listens: while the whole job is suspended, none pass.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

PULSE = "EQUILOSS_PULSE"
BEAT_SECONDS = 1.0


class Pulse:
    """A rank's signs of life, for who supervises it."""

    def __init__(self) -> None:
        self._receives, self.sends = os.pipe()
        """The end that the rank inherits."""
        os.set_blocking(self._receives, False)
        self.silence = 0.0
        """Seconds without a sign."""

    def started(self) -> None:
        """The rank has its end: ours of it is no longer needed."""
        os.close(self.sends)

    def listen(self, seconds: float, pid: int) -> None:
        """Take note of what came in a round of so many seconds."""
        try:
            heard = bool(os.read(self._receives, 2**16))
        except BlockingIOError:
            heard = False
        self.silence = 0.0 if heard or _is_traced(pid) else self.silence + seconds

    def close(self) -> None:
        """Stop to listen."""
        os.close(self._receives)


def start_pulse() -> None:
    """Begin to give signs of life, in a rank."""
    sends = int(os.environ[PULSE])

    def beat() -> None:
        while True:
            os.write(sends, b".")
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()


def end_with(descriptor: int) -> None:
    """End this process when whoever holds the other end of a pipe ends, however that ends."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _is_traced(pid: int) -> bool:
    """Whether a debugger holds a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False  # it has just ended, or the system has no such files
    return "\nTracerPid:\t0\n" not in status
