"""The `equiloss` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from equiloss.cli import catalogue, prediction
from equiloss.errors import LossError, printable, unknown
from equiloss.imports import foreign_code, import_from_here
from equiloss.launching.composition_errors import explain, mendable
from equiloss.launching.console import plain
from equiloss.losses import registry
from equiloss.losses.adapter import adapted
from equiloss.losses.signature import config_node, read


class _Commands(TyperGroup):
    """Prints an error that the user can mend in one line, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly where nobody reads on
        except Exception as error:
            if not mendable(error):
                raise
            print(f"error: {explain(error, of_a_run=False)}", file=sys.stderr)
            raise typer.Exit(1) from error


class _LossesByDefault(TyperGroup):
    """Takes `verify NAME…` for `verify losses NAME…`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["losses", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
verify = typer.Typer(
    cls=_LossesByDefault,
    help="Hold losses against the laws of a loss (`verify NAME…`), or measure what this project "
    "promises (`verify invariance`).",
)
app.add_typer(verify, name="verify")
app.command()(prediction.predict)
app.command()(prediction.show)
app.command()(prediction.export)


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    }
)
def train(context: typer.Context) -> None:
    """Train and evaluate, as `python train.py` does: `equiloss train --help` lists the keys."""
    from equiloss.launching import project

    project.train(context.args)


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
) -> None:
    """Copy a small project: a loss, a network, an experiment and a test of one's own."""
    from equiloss.launching import project

    for file in project.new(directory):
        print(plain(str(file)))
    print(plain(f"next: cd {directory} && equiloss train experiment=small"))


def _show_versions(asked: bool) -> None:
    if asked:
        packages = ("equiloss", "torch", "lightning", "hydra-core")
        print(", ".join(f"{package} {version(package)}" for package in packages))
        raise typer.Exit


@app.callback()
def _command(
    versions: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
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
        entries = [catalogue.read_entry(loss) for loss in registry.names()]
        if as_json:
            print(json.dumps([entry.summary() for entry in entries], indent=2, default=str))
        else:
            Console().print(catalogue.table(entries))
        return
    entry = catalogue.read_entry(name)
    if entry.error is not None:
        raise LossError(entry.error)
    if as_json:
        print(json.dumps(catalogue.page(entry), indent=2, default=str))
    else:
        catalogue.show_page(entry, Console())


@verify.command("losses")
def verify_losses(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME…",
            help="Registered names, or package.module:function; all registered ones by default.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OPTION=VALUE",
            help="Value of an option of the loss, as `loss.OPTION=VALUE` of a run. May be given "
            "several times.",
        ),
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON too; - prints it.")
    ] = None,
) -> None:
    """Hold losses against the laws of a loss, with the smallest counter-example to a broken one.

    It takes some seconds for the first loss and about a second for each further one. The exit
    code is 1 if a law is broken, or a plugin cannot be imported.
    """
    # Imported here: torch takes seconds, and `equiloss --help` does without it.
    from equiloss.conformance import verify_all
    from equiloss.conformance.verdict import as_json_data, show

    if any(":" in name for name in names or ()):
        import_from_here()
    given = _given_options(names or (), options or ())
    with Console(stderr=True).status("") as status:
        verdicts = verify_all(names or registry.names(), given, tell=status.update)
    if as_json != "-":
        show(verdicts, Console())
    if as_json is not None:
        text = json.dumps(as_json_data(verdicts), indent=2, default=str) + "\n"
        if as_json == "-":
            print(text, end="")
        else:
            Path(as_json).write_text(text, encoding="utf-8")
    if not all(verdict.holds for verdict in verdicts):
        raise typer.Exit(1)


def _given_options(names: Sequence[str], pairs: Sequence[str]) -> dict[str, Any]:
    """Options of the first named loss, with the types of its signature."""
    from equiloss.conformance.trial import load

    if not pairs:
        return {}
    if not names:
        raise LossError("--set gives options to the losses that are named: name one")
    try:
        with foreign_code():
            signature = read(names[0], adapted(names[0], load(names[0])))
    except Exception:  # a plugin may fail in any way, and the verdict will say so
        return {}
    node = OmegaConf.structured(config_node(names[0], signature.options))
    keys = []
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise LossError(f"--set takes OPTION=VALUE, got {pair!r}")
        if key not in signature.options:
            raise LossError(unknown(f"option of loss {names[0]!r}", key, signature.options))
        try:
            OmegaConf.update(node, key, yaml.safe_load(value))
        except OmegaConfBaseException as error:
            raise LossError(explain(error)) from error
        keys.append(key)
    plain = OmegaConf.to_container(node)  # other processes take no list of OmegaConf's
    assert isinstance(plain, dict)
    return {key: plain[key] for key in keys}


@verify.command()
def invariance(
    output: Annotated[
        Path, typer.Option(help="Directory for the table (Markdown, JSON) and the picture.")
    ] = Path("invariance"),
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this part: gradients, batch_norm, trajectories, order, evaluation or "
            "interruptions. May be given several times."
        ),
    ] = None,
) -> None:
    """Same numbers on 1 to 4 processes, in any micro-batches, after kills: measured here.

    It starts real processes on this machine and takes a few minutes on two cores. The exit code
    is 1 if a figure is beyond its bound.
    """
    # Imported here: Lightning takes seconds, and `equiloss losses` does without it.
    from equiloss.invariance.proof import prove

    report = prove(output, part or ())
    print(f"table and picture: {output}")
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def sweep(
    directory: Annotated[Path, typer.Argument(help="Directory of a sweep, as `-m` printed it.")],
) -> None:
    """Show how far a sweep has come, while it runs or after."""
    from equiloss.launching import sweep_table

    jobs, line = sweep_table.table(directory)
    console = Console()
    console.print(jobs)
    for said in (line, *sweep_table.summary(directory)):
        console.print(plain(said), soft_wrap=True)


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

    comparison = write_report(directories, output)
    head, rows = table(comparison)
    metrics = Table(*head[:5], box=box.SIMPLE_HEAD)
    for row in rows:
        metrics.add_row(*map(plain, row[:5]))
    console = Console()
    console.print(metrics)
    for place, why in comparison.run_set.skipped.items():
        print(printable(f"skipped {place}: {why}"), file=sys.stderr)
    verdict = str(comparison.verdict).splitlines()
    for line in comparison.summary(output or directories[0] / "report", verdict):
        console.print(plain(line), soft_wrap=True)
