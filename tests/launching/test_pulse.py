"""A rank that is stopped is silent; one that computes, sleeps or is suspended with all is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from equiloss.launching.pulse import PULSE, Pulse

RANK = "from equiloss.launching.pulse import start_pulse; import time; start_pulse(); {}"


@pytest.fixture
def beating() -> Iterator[tuple[Pulse, subprocess.Popen[bytes]]]:
    """A process whose main thread sleeps for long, once its first sign was heard."""
    pulse = Pulse()
    process = subprocess.Popen(
        [sys.executable, "-c", RANK.format("time.sleep(60)")],
        env={**os.environ, PULSE: str(pulse.sends)},
        pass_fds=[pulse.sends],
    )
    pulse.started()
    pulse.silence = 1.0
    while pulse.silence:
        pulse.listen(1e-3, process.pid)
        time.sleep(0.01)
    yield pulse, process
    process.kill()
    process.wait()
    pulse.close()


def heard_within(pulse: Pulse, pid: int, seconds: float) -> bool:
    """Whether there is a sign in so many seconds, counted in rounds as the listener counts them.

    On a loaded machine the rounds, too, take longer.
    """
    for _ in range(round(seconds / 0.05)):
        time.sleep(0.05)
        pulse.listen(0.05, pid)
        if pulse.silence == 0:
            return True
    return False


def test_only_who_is_stopped_is_silent(beating: tuple[Pulse, subprocess.Popen[bytes]]) -> None:
    pulse, process = beating
    assert heard_within(pulse, process.pid, 2)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # it has stopped
    pulse.listen(0.05, process.pid)  # and this was its last sign, if there is one
    assert not heard_within(pulse, process.pid, 1.5)
    assert pulse.silence > 1
    process.send_signal(signal.SIGCONT)
    assert heard_within(pulse, process.pid, 2)


def test_silence_is_counted_in_rounds_of_the_listener(
    beating: tuple[Pulse, subprocess.Popen[bytes]],
) -> None:
    """A job that is suspended as a whole, by Ctrl-Z or a lid, has no rounds."""
    pulse, process = beating
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    pulse.listen(0.05, process.pid)
    pulse.listen(0.05, process.pid)
    assert pulse.silence <= 0.1
