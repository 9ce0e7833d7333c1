"""The `equiloss` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from equiloss import catalogue
from equiloss.errors import LossError, UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
verify = typer.Typer(no_args_is_help=True, help="Measure what this project promises.")
app.add_typer(verify, name="verify")


@app.callback()
def _command() -> None:
    """Losses for image classification that are the same number, however they are written."""


@app.command()
def losses(
    name: Annotated[
        str | None, typer.Argument(help="Show this loss: formula, docstring, options and a plot.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the registered losses: where each comes from, its options, and what it can do."""
    if name is None:
        found = catalogue.entries()
        if as_json:
            print(json.dumps([one.listed() for one in found], indent=2, default=str))
        else:
            Console().print(catalogue.table(found))
        return
    try:
        one = catalogue.entry(name)
        if one.error is not None:
            raise LossError(one.error)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(catalogue.page(one), indent=2, default=str))
    else:
        catalogue.show_page(one, Console())


@verify.command()
def invariance(
    output: Annotated[
        Path, typer.Option(help="Directory for the table (Markdown, JSON) and the picture.")
    ] = Path("invariance"),
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this part: gradients, trajectories, order, evaluation or interruptions. "
            "May be given several times."
        ),
    ] = None,
) -> None:
    """Same numbers on 1 to 4 processes, in any micro-batches, after kills: measured here.

    It starts real processes on this machine and takes a few minutes on two cores. The exit code
    is 1 if a figure is beyond its bound.
    """
    # Imported here: Lightning takes seconds, and `equiloss losses` does without it.
    from equiloss.invariance.proof import prove

    try:
        report = prove(output, part or ())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"table and picture: {output}")
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def sweep(
    directory: Annotated[Path, typer.Argument(help="Directory of a sweep, as `-m` printed it.")],
) -> None:
    """Show how far a sweep has come, while it runs or after."""
    from equiloss import progress

    try:
        jobs, line = progress.table(directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    console = Console()
    console.print(jobs)
    console.print(line, highlight=False, soft_wrap=True)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Searched for run directories, in any depth.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Directory of the report; report/ in the first directory by default."),
    ] = None,
) -> None:
    """Compare runs: final metrics, curves, and whether the formulations match."""
    # Imported here: matplotlib takes a second, and `equiloss losses` does without it.
    from equiloss.report.page import table, write_report

    try:
        comparison = write_report(directories, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    head, rows = table(comparison)
    shown = Table(*(name.replace("test/", "test ") for name in head[:5]))
    for row in rows:
        shown.add_row(*row[:5])
    console = Console()
    console.print(shown)
    for place, why in comparison.found.skipped.items():
        print(f"skipped {place}: {why}", file=sys.stderr)
    console.print(f"verdict: {comparison.verdict.word}", highlight=False)
    for line in comparison.verdict.lines:
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(f"report: {output or directories[0] / 'report'}/report.md", soft_wrap=True)
