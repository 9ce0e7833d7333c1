"""The report as a page, as data and as a table for the terminal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from equiloss.errors import printable
from equiloss.records.atomic import write_atomically
from equiloss.records.results import json_ready
from equiloss.records.writing import FileError
from equiloss.report.compare import LINKS, TIMING, Comparison, compare
from equiloss.report.figures import Picture, draw_all
from equiloss.report.groups import Group
from equiloss.report.links import link_runs
from equiloss.report.pairs import Pair
from equiloss.report.ranking import best, ranking
from equiloss.report.runs import ReportError, find_runs
from equiloss.report.verdict import listed

# A table of more pairs is read by nobody.
MAX_PAIRS = 40
# What report.json holds of each pair.
PAIR_KEYS = ("label", "kind", "precision", "steps", "of_steps", "largest", "test_loss", "bitwise")


def write_report(directories: Sequence[Path], output: Path | None = None) -> Comparison:
    """Compare every run below some directories, and write the report.

    Args:
        directories: Searched for run directories, in any depth.
        output: Gets `report.md`, `report.json` and the pictures; `report/` in the first directory
            by default.

    Raises:
        ReportError: if there is no run, or the report cannot be written.
    """
    if output is None and (directories[0] / "report").is_symlink():
        raise ReportError(f"{directories[0]}/report is a link, not followed: give --output")
    output = output or directories[0] / "report"
    comparison = compare(find_runs(directories))
    try:
        output.mkdir(parents=True, exist_ok=True)
        pictures = draw_all(comparison, output)
        write_atomically(output / "report.md", page(comparison, pictures))
        text = json.dumps(data(comparison), indent=1, allow_nan=False, default=str)
        write_atomically(output / "report.json", text + "\n")
        link_runs(comparison, output / LINKS)
    except (FileError, OSError) as error:
        # The way out of a file of a run is none for a report.
        refused = error.__cause__ if isinstance(error, FileError) else error
        reason = (getattr(refused, "strerror", None) or str(refused)).lower()
        raise ReportError(f"the report cannot be written to {output}: {reason}") from error
    return comparison


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the final metrics, mean ± standard deviation over seeds, the best first."""
    objective = comparison.objective
    others = [name for name in comparison.final_metrics if name != objective]
    head = ["group", "runs", objective, "to the best", *others, "train (s)", "samples/s"]
    rows = []
    for place, group in zip(ranking(comparison.groups, objective), comparison.groups, strict=True):
        spreads = [group.spread(name) for name in (*others, *TIMING)]
        runs = f"{len(group.completed)}/{len(group.runs)}"
        behind = "-" if place.behind is None else str(place.behind)
        figures = [str(spread or "-") for spread in (place.spread, *spreads)]
        rows.append([group.label, runs, figures[0], behind, *figures[1:]])
    return head, rows


def page(comparison: Comparison, pictures: Sequence[Picture] = ()) -> str:
    """The report in Markdown, with the pictures that were drawn."""
    verdict = comparison.verdict
    lines = ["# Report", ""]
    lines += [
        f"- {_escaped(line)}"
        for line in (*best(comparison.groups, comparison.objective), verdict.headline)
    ]
    lines += ["", "## Do runs that should be the same match?", "", f"**{verdict.word}**", ""]
    lines += [f"- {_escaped(line)}" for line in verdict.lines]
    for title, items in _warnings(comparison).items():
        if items:
            lines += ["", f"## {title}", ""]
            lines += [f"- {_escaped(item)}" for item in items]
    lines += ["", "## Final metrics", ""]
    lines += [
        f"Sorted by {comparison.objective}; mean ± sample standard deviation over seeds. The",
        "difference to the best has its 95 % interval over seeds (Student's t); + is worse.",
        "",
    ]
    lines += _markdown_table(*table(comparison))
    if comparison.pairs:
        lines += ["", "## Runs that should take the same steps", ""]
        lines += _pairs_table(comparison.pairs)
    for picture in pictures:
        caption = picture.caption
        if 0 < picture.max_groups < len(comparison.groups):
            caption += f" The first {picture.max_groups} of {len(comparison.groups)} groups."
        lines += ["", f"## {picture.title}", "", caption, ""]
        lines += [f"![{picture.title}]({picture.name}.png)"]
    lines += ["", "## Keys that differ between the runs", ""]
    for key, values in comparison.differing.items():
        # Within backticks nothing else is Markdown.
        lines.append(f"- `{printable(key).replace('`', '')}`: {_escaped(_format(values))}")
    if not comparison.differing:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _warnings(comparison: Comparison) -> dict[str, list[str]]:
    """Differences, incomplete runs and unreadable files, by the title of their section."""
    run_set, environments = comparison.run_set, comparison.environments
    return {
        "Where they differ": comparison.verdict.where,
        "Differ in more than what was swept": comparison.unasked,
        "Swept in a way that hides what else differs": comparison.unsure,
        "The same configuration more than once": comparison.repeated,
        "Different environments": [f"{key}: {_format(v)}" for key, v in environments.items()],
        "Not completed": [
            f"{run.name}: {run.result.status}"
            + (f", {run.result.error}" if run.result.error else "")
            for run in run_set.runs
            if not run.completed
        ],
        "Skipped": [f"{place}: {why}" for place, why in run_set.skipped.items()],
    }


def _pairs_table(pairs: Sequence[Pair]) -> list[str]:
    """The pairs in Markdown; of too many pairs, those that differ most."""
    head = ["pair", "precision", "steps compared", "largest difference of a step"]
    head += ["of the final test loss"]
    more = len(pairs) - MAX_PAIRS
    if more > 0:
        # What cannot be compared comes first: it is the first thing to look into.
        pairs = sorted(pairs, key=lambda pair: -((pair.largest or 0) if pair.steps else math.inf))
    rows = []
    for pair in pairs[:MAX_PAIRS]:
        steps = str(pair.steps) + (f" of {pair.of_steps}" if pair.steps != pair.of_steps else "")
        worst = pair.largest_of_steps
        largest = "not comparable" if worst is None else f"{worst:.2g}"
        test_loss = "-" if pair.test_loss is None else f"{pair.test_loss:.2g}"
        rows.append([pair.label, pair.precision, steps, largest, test_loss])
    note = ["", f"{more} more, which differ less, are in report.json."] if more > 0 else []
    return [*_markdown_table(head, rows), *note]


def _escaped(text: str) -> str:
    r"""Text that Markdown shows as it is, in one line, whoever chose the names in it.

    >>> print(_escaped("![a|b](http://c) <img> `d`"))
    !\[a\|b\](http://c) \<img\> \`d\`
    """
    return re.sub(r"([\\`|<>\[\]*~$])", r"\\\1", printable(" ".join(text.split())))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is words and the others are figures."""
    cells = [[_escaped(cell) for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|---|{'---:|' * (len(head) - 1)}", *lines[1:]]


def _format(values: Sequence[Any]) -> str:
    return listed([json.dumps(value, default=str) for value in values])


def data(comparison: Comparison) -> dict[str, Any]:
    """The report as report.json holds it.

    JSON has no infinity and no NaN: they are "inf" and "nan". Null is what was not measured.
    """
    fields = vars(comparison) | {
        "verdict": asdict(comparison.verdict),
        "groups": [_group_data(group, comparison.final_metrics) for group in comparison.groups],
        "pairs": [{key: getattr(pair, key) for key in PAIR_KEYS} for pair in comparison.pairs],
        "runs": [
            {
                "name": run.name,
                "directory": str(run.directory),
                "status": run.result.status,
                "error": run.result.error,
            }
            for run in comparison.run_set.runs
        ],
        "skipped": comparison.run_set.skipped,
    }
    return {key: json_ready(value, str) for key, value in fields.items() if key != "run_set"}


def _group_data(group: Group, names: Sequence[str]) -> dict[str, Any]:
    spreads = {name: group.spread(name) for name in (*names, *TIMING)}
    metrics = {name: asdict(spread) for name, spread in spreads.items() if spread}
    return {"label": group.label, "runs": [run.name for run in group.runs], "metrics": metrics}
