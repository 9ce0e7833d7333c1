"""Two hundred kills and three hundred signals at moments drawn by a seed (`make moments`)."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from equiloss.invariance.interruption import bits
from equiloss.records.results import Result
from forks import begin, output_of, server

pytestmark = pytest.mark.moments

# Dropout and shifts, so that the generators' states and the rows' keys decide the result.
RUN = (
    "callbacks=quiet",
    "model.options.dropout=0.1",
    "data.augment.shift=1",
    "data.batch_size=64",
    "data.max_samples=600",
    "trainer.threads=1",
)
KILLED = (*RUN, "trainer.max_epochs=3", "checkpoint.every_n_steps=2", "parity.every_n_steps=5")
# Each step writes every scalar that there is to TensorBoard.
LOADED = (*RUN, "trainer.max_epochs=20", "checkpoint.every_n_steps=10", "parity.every_n_steps=1")

KILLS, SIGNALS, SIGNALS_TO_A_RUN = 200, 300, 10
LIMIT = 15.0
"""Seconds from a signal to the end of a process."""


def ended(process: BaseProcess, directory: Path, seconds: float = 120.0) -> int:
    """Wait for a run's exit code; one that does not end is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"did not end in {seconds:g} s: {output_of(directory)}")
    return process.exitcode


def completes(directory: Path, *arguments: str) -> None:
    assert ended(begin(directory, *arguments), directory) == 0, output_of(directory)
    assert Result.read(directory).status == "completed"


def assert_same(directory: Path, whole: Path) -> None:
    differ = bits(directory, whole)
    assert set(differ.values()) == {0}, differ


class Whole:
    """A run that nothing is done to: its directory, how long it took, and its file events."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        count = server.Value("i", 0)
        awake = server.Process(target=int)  # the server's own imports are no part of a run
        awake.start()
        awake.join()
        began = time.monotonic()
        process = begin(directory, *arguments, count=count)
        assert ended(process, directory) == 0, output_of(directory)
        self.seconds = time.monotonic() - began
        self.file_events = count.value


@pytest.fixture(scope="module")
def killed_not(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "run", *KILLED)


@pytest.fixture(scope="module")
def signalled_not(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "run", *LOADED)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_goes_on_to_the_bit(seed: int, killed_not: Whole, tmp_path: Path) -> None:
    """Half of the kills at a time, half at an open, rename or removal of one of the run's files."""
    draw = random.Random(seed)
    code, attempt = 0, 0
    while code == 0:  # it was done before
        attempt += 1
        directory = tmp_path / f"run-{attempt}"
        if seed % 2:
            process = begin(directory, *KILLED)
            time.sleep(draw.uniform(0, killed_not.seconds))
            process.kill()
        else:
            event = draw.randint(1, killed_not.file_events)
            process = begin(directory, *KILLED, kill_at=event)
        code = ended(process, directory)
    assert code == -signal.SIGKILL, output_of(directory)
    completes(directory, *KILLED)
    assert_same(directory, killed_not.directory)


@pytest.mark.parametrize("seed", range(SIGNALS // SIGNALS_TO_A_RUN))
def test_a_run_under_load_ends_in_time_and_goes_on(
    seed: int, signalled_not: Whole, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    sent = run = 0
    directory = tmp_path / "run-0"
    while sent < SIGNALS_TO_A_RUN:
        process = begin(directory, *LOADED)
        process.join(draw.uniform(0.05, signalled_not.seconds / 4))
        if process.exitcode == 0:  # it was done before
            run, directory = run + 1, tmp_path / f"run-{run + 1}"
            continue
        os.kill(process.pid or 0, signal.SIGTERM)
        sent += 1
        # 0: it was about to end. By the signal itself: before anything of a run had begun.
        code = ended(process, directory, LIMIT)
        assert code in (143, 0, -signal.SIGTERM), output_of(directory)
        if code == 143 and (directory / "results.json").exists():
            assert Result.read(directory).status == "interrupted"
        if code == 0:
            assert Result.read(directory).status == "completed"
            run, directory = run + 1, tmp_path / f"run-{run + 1}"
    completes(directory, *LOADED)
    assert_same(directory, signalled_not.directory)
    assert "Traceback" not in output_of(directory)
    assert not multiprocessing.active_children()
