"""The `equiloss` command."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from equiloss.errors import UserError
from equiloss.losses import registry
from equiloss.losses.signature import Signature

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _command() -> None:
    """Losses for image classification that are the same number, however they are written."""


@app.command()
def losses(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the registered losses: where each comes from, its options, and what it can do."""
    rows = []
    for name in registry.names():
        row: dict[str, object] = {"name": name}
        try:
            row["source"] = registry.provider(name).source
            row |= _describe(registry.signature(name))
        except UserError as error:
            # A broken plugin is named, and breaks no other.
            row["error"] = str(error)
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    table = Table("name", "source", "options", "soft targets", "largest logit range")
    for row in rows:
        if "error" in row:
            table.add_row(str(row["name"]), str(row.get("source", "")), str(row["error"]))
            continue
        options = row["options"]
        assert isinstance(options, dict)
        table.add_row(
            str(row["name"]),
            str(row["source"]),
            ", ".join(f"{key}={value}" for key, value in options.items()),
            "yes" if row["soft_targets"] else "no",
            str(row["max_logit_range"] or "any"),
        )
    Console().print(table)


def _describe(signature: Signature) -> dict[str, object]:
    limit = signature.max_logit_range
    if callable(limit):
        import torch

        limit = {str(d).removeprefix("torch."): limit(d) for d in (torch.float32, torch.float64)}
    return {
        "options": {key: option.default for key, option in signature.options.items()},
        "supports": sorted(signature.supported),
        "soft_targets": signature.soft_targets,
        "shift_invariant": signature.shift_invariant,
        "max_logit_range": limit,
    }
