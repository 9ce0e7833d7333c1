"""The whole proof: every part is measured in turn, and the report written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from equiloss.errors import choose
from equiloss.invariance import (
    batch_norm,
    evaluation,
    gradients,
    interruption,
    order,
    trajectories,
)
from equiloss.invariance.cells import Part, Report
from equiloss.invariance.picture import draw
from equiloss.records.results import environment

PARTS: dict[str, Callable[[Path], dict[str, Part]]] = {
    "gradients": lambda _: gradients.measure(),
    "batch_norm": lambda _: batch_norm.measure(),
    "trajectories": trajectories.measure,
    "order": order.measure,
    "evaluation": evaluation.measure,
    "interruptions": interruption.measure,
}


def prove(
    directory: Path,
    parts: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = print,
) -> Report:
    """Measure the parts, and write `invariance.md`, `invariance.json` and `invariance.png`.

    Args:
        directory: Where the report goes.
        parts: Names in `PARTS`; none means all.
        tell: Is given a line after each part.

    Raises:
        ConfigError: for an unknown part.
    """
    for name in parts:
        choose("part", name, tuple(PARTS))
    measured: dict[str, Part] = {}
    for name, measure in PARTS.items():
        if parts and name not in parts:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as runs:
            new = measure(Path(runs))
        measured |= new
        seconds = time.perf_counter() - began
        cells = [cell for part in new.values() for cell in part.cells]
        broken = sum(not cell.holds for cell in cells)
        worst = max(cell.figure for cell in cells)
        verdict = f"{broken} BEYOND THEIR BOUND" if broken else "all within their bounds"
        tell(f"{name}: {len(cells)} figures, {verdict}, largest {worst:.1e} ({seconds:.0f} s)")
    # The ranks have a thread each, whatever this process has.
    report = Report(measured, environment(torch.device("cpu")) | {"threads": 1})
    report.write(directory)
    draw(report, directory / "invariance.png")
    return report
