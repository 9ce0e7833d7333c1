"""A folder of links in which each run has a name to read: TensorBoard shows the names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from equiloss.report.compare import Comparison

# No file system takes more than 255 bytes.
LONGEST = 60


def link_runs(comparison: Comparison, folder: Path) -> None:
    """Replace the relative links of a folder by those to the runs of a comparison.

    Where links cannot be made, that is noted among what was skipped.
    """
    try:
        if folder.is_symlink():
            raise FileExistsError(f"{folder} is a link")
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.is_symlink():
                old.unlink()
        for group in comparison.groups:
            for run in group.runs:
                _free(folder, f"{readable(group.label)} s{readable(str(run.seed))}").symlink_to(
                    os.path.relpath(run.directory, folder.resolve())
                )
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        comparison.run_set.skipped[str(folder)] = f"has no links to the runs: {why}"


def readable(label: str) -> str:
    """A label without what shells and TensorBoard take for something else.

    >>> readable("focal, lr=0.05, widths=[8, 16]")
    'focal lr-0.05 widths-8 16'
    """
    return re.sub(r"[^\w.+-]+", " ", label.replace("=", "-").replace("-[", "-"))[:LONGEST].strip()


def _free(folder: Path, name: str) -> Path:
    """A name in a folder that nothing has."""
    numbers = ("", *(f" ({number})" for number in range(2, 10_000)))
    return next(
        folder / f"{name}{n}" for n in numbers if not os.path.lexists(folder / f"{name}{n}")
    )
