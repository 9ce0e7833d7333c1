"""`equiloss predict`, `equiloss export` and `equiloss show`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from equiloss.errors import ConfigError, RecordError, printable
from equiloss.imports import import_from_here
from equiloss.launching.console import plain
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import fits, read_json
from equiloss.records.results import json_ready
from equiloss.records.writing import writing

if TYPE_CHECKING:
    from equiloss.prediction.files import Row

ANOTHER = "name another file with --output"
CERTIFICATES = "certificate.json"

Trained = Annotated[
    str, typer.Argument(metavar="RUN|CKPT", help="The directory of a run, or a checkpoint.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="package.module:function of a network of your own (model=custom): code that a "
        "checkpoint names is run only where it is named here too."
    ),
]


def predict(
    trained: Trained,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH…", help="Images, folders, or - for a list on standard input."),
    ],
    top: Annotated[int, typer.Option(help="Most probable classes to show.", min=1)] = 1,
    output: Annotated[
        str | None, typer.Option(help="Write a .csv or .json file instead of a table.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize pictures where training did not.")
    ] = False,
    target: Target = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> None:
    """Say of new pictures what a trained run makes of them.

    Pictures are read and normalised as in training. Those that cannot be read are named and left
    out, and the exit code is then 1.
    """
    from equiloss.prediction import files, model  # torch takes seconds

    if output is not None:
        _check_output(Path(output), (".csv", ".json"))
    if target is not None:
        import_from_here()
    network = model.load(trained, target=target, device=device)
    found, passed_over = files.listed(paths, lines=sys.stdin)
    if not found:
        raise ConfigError(f"{', '.join(paths)}: no image to predict")
    if passed_over:
        print(f"{passed_over} files are no images, and are passed over", file=sys.stderr)
    top = min(top, len(network.classes))
    rows = [*files.predict(network, found, top=top, batch_size=batch_size, resizes=resize)]
    broken = [row.error for row in rows if row.error is not None]
    if output is None and len(broken) < len(rows):
        Console().print(_table(rows, top))
    elif output is not None:
        write_atomically(Path(output), files.written(rows, Path(output)), ANOTHER)
        print(f"{len(rows) - len(broken)} predictions in {output}")
    for error in broken:
        print(f"error: {printable(error)}", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def _check_output(path: Path, endings: Sequence[str], rule: str = "") -> None:
    """Refuse before the work what could not be written after it."""
    if path.suffix not in endings:
        raise ConfigError(f"--output={path} must end in {' or '.join(endings)}{rule}")
    if path.is_dir():
        raise ConfigError(f"--output={path} is a directory: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--output={path}: there is no directory {path.parent}")


def _table(rows: list[Row], top: int) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("path", overflow="fold")
    for number in range(1, top + 1):
        table.add_column("class" if number == 1 else f"class {number}")
        table.add_column("probability", justify="right")
    for row in (row for row in rows if row.error is None):
        cells = [text for name, value in row.top for text in (plain(name), f"{value:.4f}")]
        table.add_row(plain(str(row.file)), *cells)
    return table


def show(
    trained: Trained,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a checkpoint is: network, classes, how pictures are read, loss, metrics."""
    from dataclasses import asdict

    from equiloss.prediction.model import checkpoint_of, read_checkpoint

    path = checkpoint_of(Path(trained))
    loaded, state, about = read_checkpoint(path)
    said = {
        "checkpoint": str(path),
        **asdict(about),
        "loss": state.loss,
        "metrics": state.progress.of_split("val") | state.progress.of_split("test"),
        "steps": loaded.get("global_step"),
        "split_sizes": state.split_sizes,
    }
    if as_json:
        print(json.dumps(json_ready(said), indent=2, default=str, allow_nan=False))
        return
    table = Table(box=None, show_header=False)
    for key, value in said.items():
        table.add_row(key, plain(_text(value)))
    Console().print(table)


def export(
    trained: Trained,
    kind: Annotated[str, typer.Option("--format", help="onnx | torch-export.")] = "onnx",
    output: Annotated[
        str | None, typer.Option(help="The file to write (default: model.onnx or model.pt2).")
    ] = None,
    target: Target = None,
) -> None:
    """Write a trained network to a file, and certify on the test split that it is that network.

    The file takes uint8 images [N, C, H, W] and gives probabilities and logits. certificate.json
    lies beside it; a file that is another function ends in .rejected, and the exit code is 1.
    """
    from equiloss.prediction import certificate, model  # torch takes seconds
    from equiloss.prediction import export as exporting

    exporting.check_format(kind)
    place = Path(output or f"model{exporting.FORMATS[kind]}")
    _check_output(place, [exporting.FORMATS[kind]], f", for --format={kind}")
    certificates = place.with_name(CERTIFICATES)
    known = _certificates(certificates)
    if target is not None:
        import_from_here()
    network = model.load(trained, target=target)
    images, truth = certificate.test_split(network.path)
    untried = place.with_name(f".untried-{place.name}")
    try:
        with writing(place, ANOTHER):
            exporting.export(network, kind, untried)
        found = certificate.certify(network, kind, untried, images, truth, name=place)
        kept = place if found.holds else place.with_name(f"{place.name}.rejected")
        with writing(kept, ANOTHER):
            untried.replace(kept)
    finally:
        with suppress(OSError):  # the error that it ends with is the one to show
            untried.unlink(missing_ok=True)
    known[kept.name] = found.as_dict()
    text = json.dumps(json_ready(known), indent=1, allow_nan=False) + "\n"
    write_atomically(certificates, text, ANOTHER)
    print(plain(f"{kept}: {found.describe()}"))
    if not found.holds:
        raise typer.Exit(1)


def _certificates(file: Path) -> dict[str, Any]:
    """Those of a directory's files, by their names.

    Raises:
        RecordError: for a file of another kind, which is not ours to replace.
    """
    known = read_json(file) if file.exists() else {}
    if not fits(known, dict[str, dict[str, Any]]):
        raise RecordError(file, "is no mapping of files to certificates")
    return dict(known)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
