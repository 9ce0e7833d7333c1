"""What a signal does to the code that it meets."""

from __future__ import annotations

import os
import signal

import pytest

from equiloss.distributed import interruption
from equiloss.distributed.interruption import Interrupted


def fail_on_the_way_out() -> None:
    """As OmegaConf does, in the middle of a node that it makes."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")


def fail_after_a_note() -> None:
    interruption.wait_for_steps()
    os.kill(os.getpid(), signal.SIGTERM)
    with interruption.prevailing():
        _ = 1 / 0


def test_it_prevails_over_the_errors_that_it_caused() -> None:
    with pytest.raises(Interrupted) as caught, interruption.listening(), interruption.prevailing():
        fail_on_the_way_out()
    assert caught.value.code == 143
    assert isinstance(caught.value.__cause__, AttributeError)


def test_an_error_of_before_or_after_is_itself() -> None:
    with pytest.raises(ZeroDivisionError), interruption.listening(), interruption.prevailing():
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), interruption.listening():
        fail_after_a_note()
