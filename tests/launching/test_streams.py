"""What becomes of standard output and error is no business of the run's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equiloss.records.results import Result
from support import PYTHONPATH, QUIET, ROOT, slow

SCRIPT = """
import subprocess, sys
from pathlib import Path
from equiloss.launching import streams
streams.make_optional()
streams.make_optional()
file = open(sys.argv[1], "w")
for stream in (sys.stdout, sys.stderr):
    for _ in range(3000):
        print("per mille: \\u2030 " + 20 * "-", file=stream)
subprocess.run(["echo", "of a child"], check=sys.__stdout__ is None)
file.write("done")
"""


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" 2>&1 | head -c 1',
        '"$@" > /dev/full 2>&1',
        '"$@" >&- 2>&-',
        '"$@" <&- >&- 2>&-',
        'PYTHONIOENCODING=ascii "$@" 2>&1',
    ],
)
def test_a_process_goes_on_whatever_becomes_of_its_output(shell: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    command = [sys.executable, "-c", SCRIPT, str(file)]
    done = subprocess.run(
        ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}", "bash", *command],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Nothing that was printed has ended in a file which had got a closed descriptor's number.
    assert file.read_text() == "done"
    if "ascii" in shell:
        assert done.stdout.count("per mille: \\u2030") == 6000


@slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_whose_output_goes_to_a_full_disk_completes_and_has_a_log(
    devices: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = (
        *QUIET,
        "logger=csv",
        "parity=off",
        "data.max_samples=64",
        "trainer.max_epochs=1",
        f"trainer.devices={devices}",
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={run}"],
            stdout=full,
            stderr=full,
            timeout=120,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            check=False,
        )
    assert done.returncode == 0
    assert Result.read(run).status == "completed"
    log = (run / "train.log").read_text(encoding="utf-8")
    assert f"run directory: {run}" in log
