"""The report as a page, as data and as a few lines for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from equiloss.atomic import write_atomically
from equiloss.report.compare import SHOWN, TIMING, Comparison, Spread, compare
from equiloss.report.figures import draw_all
from equiloss.report.runs import find


def write_report(directories: Sequence[Path], output: Path | None = None) -> Comparison:
    """Compare every run below some directories, and write what was found.

    Args:
        directories: Searched for run directories, in any depth.
        output: Gets `report.md`, `report.json` and the pictures; `report/` in the first directory
            by default.

    Raises:
        ReportError: if there is no run.
    """
    output = output or directories[0] / "report"
    comparison = compare(find(directories))
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(comparison, output)
    write_atomically(output / "report.md", _page(comparison, pictures))
    data = json.dumps(_finite(_data(comparison)), indent=1, allow_nan=False)
    write_atomically(output / "report.json", data + "\n")
    return comparison


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the final metrics, mean ± standard deviation over seeds."""
    head = ["group", "runs", *SHOWN, *("train (s)", "samples/s")]
    rows = []
    for group in comparison.groups:
        completed = sum(run.completed for run in group.runs)
        spreads = [group.spread(name) for name in (*SHOWN, *TIMING)]
        rows.append([group.label, f"{completed}/{len(group.runs)}", *map(_shown, spreads)])
    return head, rows


def _shown(spread: Spread | None) -> str:
    """A mean with its deviation.

    >>> _shown(Spread(0.98765, 0.0012, 3)), _shown(Spread(123.4, None, 1))
    ('0.9877 ± 0.0012', '123.4')
    """
    if spread is None:
        return "-"
    if spread.deviation is None:
        return f"{spread.mean:.4g}"
    return f"{spread.mean:.4g} ± {spread.deviation:.2g}"


def _page(comparison: Comparison, pictures: Mapping[str, str]) -> str:
    verdict, found = comparison.verdict, comparison.found
    lines = [
        "# Report",
        "",
        f"Do the runs match? **{verdict.word}**",
        *([f"\nDiffers: {', '.join(verdict.wrong)}."] if verdict.wrong else []),
        "",
        *(f"- {line}" for line in verdict.lines),
    ]
    for title, items in (
        ("Differ in more than what was swept", comparison.unasked),
        (
            "Different environments",
            [f"{key}: {_listed(values)}" for key, values in comparison.environments.items()],
        ),
        (
            "Not completed",
            [
                f"{run.name}: {run.result.status}" + (f", {error}" if error else "")
                for run in found.runs
                if not run.completed
                for error in [run.result.error]
            ],
        ),
        ("Skipped", [f"{place}: {why}" for place, why in found.skipped.items()]),
    ):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    head, rows = table(comparison)
    lines += ["", "## Final metrics", "", "Mean ± sample standard deviation over seeds.", ""]
    lines += [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if comparison.pairs:
        lines += ["", "## Runs that should take the same steps", ""]
        lines += ["| pair | precision | largest difference of a step | of the final test loss |"]
        lines += ["|---|---|---:|---:|"]
        for pair in comparison.pairs:
            step = max((value for _, value in pair.apart), default=None)
            steps, loss = ("-" if x is None else f"{x:.2g}" for x in (step, pair.test_loss))
            lines.append(f"| {pair.label} | {pair.precision} | {steps} | {loss} |")
    for file, caption in pictures.items():
        lines += ["", f"## {caption}", "", f"![{caption}]({file})"]
    lines += ["", "## Keys that differ between the runs", ""]
    lines += [f"- `{key}`: {_listed(values)}" for key, values in comparison.differing.items()]
    return "\n".join(lines) + "\n"


def _listed(values: Sequence[Any]) -> str:
    shown = ", ".join(json.dumps(value) for value in values[:6])
    return shown + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def _data(comparison: Comparison) -> dict[str, Any]:
    return {
        "verdict": asdict(comparison.verdict),
        "ratios": comparison.ratios,
        "groups": [
            {
                "label": group.label,
                "runs": [run.name for run in group.runs],
                "metrics": {
                    name: asdict(spread)
                    for name in (*SHOWN, *TIMING)
                    if (spread := group.spread(name))
                },
            }
            for group in comparison.groups
        ],
        "pairs": [
            {
                "label": pair.label,
                "kind": pair.kind,
                "precision": pair.precision,
                "largest": pair.worst,
                "test_loss": pair.test_loss,
                "bitwise": pair.bitwise,
            }
            for pair in comparison.pairs
        ],
        "between_seeds": comparison.seeds,
        "differing": comparison.differing,
        "unasked": comparison.unasked,
        "environments": comparison.environments,
        "runs": [
            {"name": run.name, "status": run.result.status, "error": run.result.error}
            for run in comparison.found.runs
        ],
        "skipped": comparison.found.skipped,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
