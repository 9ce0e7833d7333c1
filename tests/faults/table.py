"""Writes docs/faults.md from the rows that `make faults` has left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """# What becomes of a run when something goes wrong

Written by `make faults`; do not edit. It starts a run of twelve steps for each row, on one process
or on two (gloo), does to it what the first column says, and asserts outcome, exit code, message
and time; where the last column says so, also that the run, continued where it has not completed,
ends with the bits of one that nothing was done to: weights, optimizer, schedule, generators and
metrics.csv. {count} faults; seconds from the fault to the end of the process, on 2 cores of a
shared machine.

| fault | processes | promise | exit code | seconds | at most | to the bit |
|---|---:|---|---:|---:|---:|---|
"""
TAIL = """
## What is promised beyond the table

- **A second signal** ends a run at once. Nothing that a reader could see is half written at any
  moment: files are written beside their place and moved there.
- **During the validation of a fit** a signal waits for its end: an epoch is saved with its
  validation. A test or an evaluation ends between two batches.
- **SIGUSR2** is left to others. A handler that another program has installed for the other signals
  (submitit's, which requeues the job) is called when the state is on disk.
- **Ctrl-Z** stops train.py; ranks are in sessions of their own and go on. No limit counts the time
  in which a job is suspended, and a rank in a debugger is not taken for silent.
- **Under torchrun and srun** nobody supervises the ranks: `trainer.rank_timeout_s` is then the
  timeout of the process group, and a rank in a debugger is not told from a silent one.
- **SIGKILL, no power**: the state before is whole. With `checkpoint.every_n_steps` unset that is
  the end of the last epoch.

## Whose code runs

A configuration is a program: `model.target`, `data.target`, `loss.target` and `_target_` name
code, which runs. Whoever gives you a command line gives you a program.

A run directory and a checkpoint are data, and stay data: going on with a run, `task=test`,
`equiloss report` and `equiloss sweep` execute nothing that is in them. Checkpoints are read as
tensors and plain data; files are bounded in size, depth and aliases before they are parsed; no
symbolic link is followed; what they say is escaped before it is shown. TensorBoard listens on this
machine alone unless you tell it otherwise.
"""


def main(rows: Path, output: Path) -> None:
    faults = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = [
        f"| {row['fault']} | {row['ranks']} | {row['promise']} | {row['code']} "
        f"| {row['seconds']:.1f} | {row['limit']:g} | {'yes' if row['resumes'] else ''} |"
        for row in sorted(faults, key=lambda row: (row["promise"], row["fault"], row["ranks"]))
    ]
    text = HEAD.format(count=len(faults)) + "\n".join(lines) + "\n" + TAIL
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
