"""What becomes of a run when something goes wrong: one fault after the other, on real processes.

`make faults` runs all of them and writes docs/faults.md. Each asserts outcome, exit code, message
and time, and that the run then resumes to the bits of one that nothing was done to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from equiloss.invariance.interruption import bits
from equiloss.records.results import Result
from faults.catalogue import FAULTS, Fault
from processes import start, until_it_trains
from support import write_noise

pytestmark = pytest.mark.faults


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        return process.communicate(timeout=seconds)[0] or ""  # its reader may have left
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of run: one that nothing is done to, and one that was stopped."""
    place = tmp_path_factory.mktemp("prepared")
    write_noise(place / "images", ("cats", "dogs"), count=30)
    return place


def whole(place: Path, fault: Fault) -> Path:
    directory = place / f"whole-{fault.kind}-{fault.ranks}"
    if not directory.exists():
        process = start(directory, *fault.run(place))
        output = ended(process, 180)
        assert process.returncode == 0, output
    return directory


def stopped(place: Path, fault: Fault) -> Path:
    directory = place / f"stopped-{fault.kind}-{fault.ranks}"
    if not directory.exists():
        process = start(directory, *fault.run(place))
        until_it_trains(process, directory)
        process.send_signal(signal.SIGTERM)
        output = ended(process, 60)
        assert process.returncode == 143, output
    return directory


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.ranks}")
def test_fault(fault: Fault, prepared: Path, tmp_path: Path) -> None:
    reference = whole(prepared, fault) if fault.resumes else None
    directory = tmp_path / "run"
    if fault.kind == "folder":
        shutil.copytree(prepared / "images", tmp_path / "images")
    if fault.damages is not None:
        shutil.copytree(stopped(prepared, fault), directory)
        fault.damages(directory)

    process = start(
        directory,
        *fault.run(tmp_path),
        *fault.arguments,
        environment=fault.variables(tmp_path),
        prepare=fault.prepare,
        redirected=fault.redirected,
    )
    if fault.does is not None:
        if fault.when_it_trains:
            until_it_trains(process, directory)
        fault.does(process)
    began = time.monotonic()
    output = ended(process, fault.seconds)
    seconds = time.monotonic() - began
    assert process.returncode == fault.code, output
    assert re.search(fault.says, output, re.DOTALL), output
    assert "Traceback" not in output
    if fault.status is not None:
        assert Result.read(directory).status == fault.status

    if reference is not None:
        if fault.code != 0:
            again = start(directory, *fault.run(prepared))
            output = ended(again, 180)
            assert again.returncode == 0, output
        assert Result.read(directory).status == "completed"
        differ = bits(directory, reference)
        if fault.loses_rows:
            assert differ.pop("metrics.csv") > 0
        assert set(differ.values()) == {0}, differ
    note(fault, seconds)


def note(fault: Fault, seconds: float) -> None:
    """Leave a row for docs/faults.md, where `make faults` wants one."""
    table = os.environ.get("EQUILOSS_FAULTS")
    if table:
        row = {
            "fault": fault.name,
            "ranks": fault.ranks,
            "promise": fault.promise,
            "code": fault.code,
            "seconds": seconds,
            "limit": fault.seconds,
            "resumes": fault.resumes,
        }
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
