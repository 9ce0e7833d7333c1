"""Signals that end a run: acted upon at once while it starts, and between steps once it trains.

A signal may come inside a collective, the lock of a writer, half a file. While a run trains it is
therefore only noted, the ranks agree on it with the sums of the next step, and all of them stop
after the same step, with their state on disk. A second signal ends the process at once.

SIGINT, SIGTERM, SIGHUP (unless `nohup` has it ignored) and SIGUSR1, which SLURM sends ahead of the
end by `--signal=USR1@90`, are understood. SIGUSR2 is left to others.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Exit code of a rank that stops because another one was asked to; sysexits.h calls it EX_TEMPFAIL.
BY_ANOTHER = 75
# As timeout(1) ends.
OUT_OF_TIME = 124


# A run may not leave by it (see `equiloss.launching.launch`); who insists may.
_leave = os._exit


class Interrupted(BaseException):  # no error, as KeyboardInterrupt is none
    """A run was asked to stop before its end.

    Args:
        cause: Name of the signal, or of what else asked for it.
        code: Exit code of the process; after signal n it is 128 + n, as a shell has it.
    """

    def __init__(self, cause: str, code: int) -> None:
        super().__init__(cause, code)
        self.cause = cause
        self.code = code

    def __str__(self) -> str:
        return f"interrupted by {self.cause}"

    @property
    def number(self) -> int | None:
        """Number of the signal that this process got; None if it got none."""
        return self.code - 128 if self.code > 128 else None


def of_code(code: int) -> Interrupted | None:
    """What a process was interrupted by, by its exit code; None if it was not.

    >>> str(of_code(143)), of_code(1)
    ('interrupted by SIGTERM', None)
    """
    if code == OUT_OF_TIME:
        return Interrupted("trainer.max_time", code)
    return Interrupted(signal.Signals(code - 128).name, code) if code - 128 in SIGNALS else None


def name_of(number: int) -> str:
    """A signal's name, or its number where it has none, as real-time signals.

    >>> name_of(9), name_of(35)
    ('SIGKILL', 'signal 35')
    """
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


class _State:
    """What this process was asked; signals belong to a process, not to a run in it."""

    asked: Interrupted | None = None
    raised = False
    """Whether it was raised where the signal came, in anybody's code."""
    waits = False
    """Whether a signal is only noted."""
    replaced: dict[int, Any] = {}  # noqa: RUF012  # one process has one
    """Handlers that were there before."""
    last_words: Callable[[], None] | None = None
    ending = False
    """Whether this process is about to end by itself."""


def asked() -> Interrupted | None:
    """What asked this process to stop; None if nothing has."""
    return _State.asked


def wish(like: Tensor) -> Tensor:
    """1 on a rank that was asked to stop, otherwise 0, 0-dim: it travels with what is summed."""
    return like.new_full((), float(_State.asked is not None))


def ask_for_lack_of_time() -> None:
    """Have the run stop after the step under way, as a signal does."""
    _State.asked = _State.asked or of_code(OUT_OF_TIME)


def check() -> None:
    """Stop here if this process was asked to.

    Raises:
        Interrupted: with the cause.
    """
    if _State.asked is not None:
        raise _State.asked


def stop() -> NoReturn:
    """Stop here, whichever rank was asked to.

    Raises:
        Interrupted: with the cause.
    """
    raise _State.asked or Interrupted("a signal to another rank", BY_ANOTHER)


@contextmanager
def listening() -> Iterator[None]:
    """Understand signals while the context lasts; a handler of another program is called after it.

    Raises:
        Interrupted: inside the context, when a signal comes and no run trains.
    """
    if _State.replaced or threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.asked, _State.raised = None, False
    _take()
    try:
        yield
    except Interrupted as interrupted:
        before = _give_back()
        handler = before.get(interrupted.number or 0)
        # Submitit's, which requeues the job, and whoever else waits for the signal.
        if callable(handler) and handler is not signal.default_int_handler:
            handler(interrupted.number, None)
        raise
    finally:
        _give_back()


@contextmanager
def prevailing() -> Iterator[None]:
    """Have an interruption prevail over the errors that it caused on its way out.

    Code that it met in the middle may fail as it cleans up.
    """
    try:
        yield
    except Exception as error:
        if _State.raised and _State.asked is not None:
            raise _State.asked from error
        raise


@contextmanager
def during_a_run() -> Iterator[None]:
    """Undo at the end what `wait_for_steps` has done in a run."""
    listens = bool(_State.replaced)
    if _State.asked is not None and (_State.asked.number is None or not listens):
        _State.asked = None  # it asked the run before
    try:
        yield
    finally:
        _State.waits = False
        if not listens:
            _give_back()


def wait_for_steps() -> None:
    """From now on only note a signal: the run trains, and asks between its steps."""
    if threading.current_thread() is threading.main_thread():
        # A rank has left signals to the system until here: it may wait for others in code that
        # no handler of Python's reaches.
        _take()
        _State.waits = True


@contextmanager
def last_words(say: Callable[[], None]) -> Iterator[None]:
    """Call something before a second signal ends the process, while the context lasts."""
    _State.last_words = say
    try:
        yield
    finally:
        _State.last_words = None


def leave_to_the_system() -> None:
    """End this process at once by a signal, until it trains."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def end_with(code: int) -> None:
    """Have a signal end this process with a code, as it is about to end by itself."""
    _State.ending = True
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: _leave(code))


def ignore_at_the_end() -> None:
    """Ignore signals, where `end_with` was called: Python lets one kill it while it shuts down."""
    if _State.ending:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _take() -> None:
    for number in SIGNALS:
        before = signal.getsignal(number)
        # What is ignored (nohup, a shell's background) stays ignored.
        if before is not _handle and before not in (signal.SIG_IGN, None):
            _State.replaced[number] = before
            signal.signal(number, _handle)


def _give_back() -> dict[int, Any]:
    before = dict(_State.replaced)
    for number, handler in before.items():
        if not _State.ending:
            signal.signal(number, handler)
    _State.replaced.clear()
    _State.waits = False
    return before


def _handle(number: int, _frame: FrameType | None) -> None:
    if _State.asked is not None and _State.asked.number is not None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # a third one would come in between
        with suppress(Exception):
            if _State.last_words is not None:
                _State.last_words()
        # Files are whole at any moment; who insists does not wait for a clean end.
        _leave(_State.asked.code)
    _State.asked = Interrupted(signal.Signals(number).name, 128 + number)
    if not _State.waits:
        _State.raised = True
        raise _State.asked
