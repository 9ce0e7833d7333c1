"""The report as a page, as data and as a few lines for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from equiloss.records.atomic import write_atomically
from equiloss.report.compare import SHOWN, TIMING, Comparison, compare
from equiloss.report.figures import Picture, draw_all
from equiloss.report.groups import Spread
from equiloss.report.runs import ReportError, find
from equiloss.report.verdict import listed

# A table of more pairs is read by nobody.
MOST_PAIRS = 40


def write_report(directories: Sequence[Path], output: Path | None = None) -> Comparison:
    """Compare every run below some directories, and write what was found.

    Args:
        directories: Searched for run directories, in any depth.
        output: Gets `report.md`, `report.json` and the pictures; `report/` in the first directory
            by default.

    Raises:
        ReportError: if there is no run, or the report cannot be written.
    """
    output = output or directories[0] / "report"
    comparison = compare(find(directories))
    try:
        output.mkdir(parents=True, exist_ok=True)
        pictures = draw_all(comparison, output)
        write_atomically(output / "report.md", page(comparison, pictures))
        text = json.dumps(data(comparison), indent=1, allow_nan=False)
        write_atomically(output / "report.json", text + "\n")
    except OSError as error:
        raise ReportError(f"the report cannot be written to {output}: {error}") from error
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
    """A mean with its deviation, which has two digits.

    >>> _shown(Spread(0.98765, 0.0012, 3)), _shown(Spread(7386.2, 493.1, 2))
    ('0.9877 ± 0.0012', '7386 ± 493')
    >>> _shown(Spread(123.4, None, 1)), _shown(Spread(1e-9, 1e-10, 2)), _shown(None)
    ('123.4', '1e-09 ± 1e-10', '-')
    """
    if spread is None:
        return "-"
    if not math.isfinite(spread.mean):
        return "not finite"
    if not spread.deviation:
        return f"{spread.mean:.4g}" + ("" if spread.deviation is None else " ± 0")
    decimals = max(1 - math.floor(math.log10(spread.deviation)), 0)
    if decimals > 6:
        return f"{spread.mean:.4g} ± {spread.deviation:.2g}"
    return f"{spread.mean:.{decimals}f} ± {spread.deviation:.{decimals}f}"


def page(comparison: Comparison, pictures: Sequence[Picture] = ()) -> str:
    """The report in Markdown, with the pictures that were drawn."""
    verdict = comparison.verdict
    lines = ["# Report", "", f"Do the runs match? **{verdict.word}**", ""]
    lines += [f"- {line}" for line in verdict.lines]
    for title, items in _sections(comparison):
        if items:
            lines += ["", f"## {title}", ""]
            lines += [f"- {' '.join(item.split())}" for item in items]
    lines += ["", "## Final metrics", "", "Mean ± sample standard deviation over seeds.", ""]
    lines += _markdown(*table(comparison))
    if comparison.pairs:
        lines += ["", "## Runs that should take the same steps", ""]
        lines += _markdown(*_pairs(comparison))
        if len(comparison.pairs) > MOST_PAIRS:
            more = len(comparison.pairs) - MOST_PAIRS
            lines += ["", f"{more} more, which differ less, are in report.json."]
    for picture in pictures:
        caption = picture.caption
        if 0 < picture.most < len(comparison.groups):
            caption += f" The first {picture.most} of {len(comparison.groups)} groups."
        lines += ["", f"## {picture.title}", "", caption, ""]
        lines += [f"![{picture.title}]({picture.name}.png)"]
    lines += ["", "## Keys that differ between the runs", ""]
    lines += [f"- `{key}`: {_values(values)}" for key, values in comparison.differing.items()]
    if not comparison.differing:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What a reader must not miss, by its title."""
    found, environments = comparison.found, comparison.environments
    return [
        ("Where they differ", comparison.verdict.where),
        ("Differ in more than what was swept", comparison.unasked),
        ("Swept in a way that hides what else differs", comparison.unsure),
        ("The same configuration more than once", comparison.repeated),
        (
            "Different environments",
            [f"{key}: {_values(values)}" for key, values in environments.items()],
        ),
        (
            "Not completed",
            [
                f"{run.name}: {run.result.status}"
                + (f", {run.result.error}" if run.result.error else "")
                for run in found.runs
                if not run.completed
            ],
        ),
        ("Skipped", [f"{place}: {why}" for place, why in found.skipped.items()]),
    ]


def _pairs(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["pair", "precision", "steps compared", "largest difference of a step"]
    head += ["of the final test loss"]
    pairs = comparison.pairs
    if len(pairs) > MOST_PAIRS:
        # What cannot be compared comes first: it is the first thing to look into.
        pairs = sorted(pairs, key=lambda pair: -(math.inf if not pair.apart else pair.worst or 0))
    rows = [
        [
            pair.label,
            pair.precision,
            str(pair.steps)
            if len(pair.apart) == pair.steps
            else f"{len(pair.apart)} of {pair.steps}",
            "not comparable" if pair.worst_step is None else f"{pair.worst_step:.2g}",
            "-" if pair.test_loss is None else f"{pair.test_loss:.2g}",
        ]
        for pair in pairs[:MOST_PAIRS]
    ]
    return head, rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is words and the others are figures."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|---|{'---:|' * (len(head) - 1)}", *lines[1:]]


def _values(values: Sequence[Any]) -> str:
    return listed([json.dumps(value, default=str) for value in values])


def data(comparison: Comparison) -> dict[str, Any]:
    """The report as report.json holds it.

    JSON has no infinity and no NaN: they are "inf" and "nan". Null is what was not measured.
    """
    found: dict[str, Any] = {
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
                "steps": len(pair.apart),
                "of_steps": pair.steps,
                "largest": pair.worst,
                "test_loss": pair.test_loss,
                "bitwise": pair.bitwise,
            }
            for pair in comparison.pairs
        ],
        "between_seeds": comparison.seeds,
        "differing": comparison.differing,
        "unasked": comparison.unasked,
        "unsure": comparison.unsure,
        "repeated": comparison.repeated,
        "environments": comparison.environments,
        "runs": [
            {
                "name": run.name,
                "directory": str(run.directory),
                "status": run.result.status,
                "error": run.result.error,
            }
            for run in comparison.found.runs
        ],
        "skipped": comparison.found.skipped,
    }
    ready: dict[str, Any] = _ready(found)
    return ready


def _ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
