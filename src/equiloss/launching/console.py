"""Prints the final metrics of a run, its verdict on parity, and its directory.

Without Lightning, which takes seconds to import: a process that supervises ranks prints them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from equiloss.config import SPLIT_METRICS
from equiloss.errors import printable
from equiloss.records.results import Result, beyond
from equiloss.records.run_dir import METRICS, has_events
from equiloss.records.train_log import append


def plain(text: str) -> Text:
    """Text that Rich shows as it is, in one line, whatever it holds: a name is no markup."""
    return Text(printable(text))


def show(result: Result, run_dir: Path) -> None:
    """Print the final metrics, the parity verdict, and where everything is; also to train.log."""
    console = Console(record=True)
    table = Table(title=plain(f"{result.loss['name']}: {result.status}"))
    table.add_column("metric")
    splits = [split for split in ("val", "test") if f"{split}/loss" in result.metrics]
    for split in splits:
        table.add_column(split, justify="right")
    logged = (each.partition("/")[2] for each in result.metrics if each.startswith("val/"))
    for name in dict.fromkeys([*SPLIT_METRICS, *logged]):
        if name == "acc_top5" and (result.num_classes or 6) <= 5:
            continue  # every class is among the first five
        values = (result.metrics.get(f"{split}/{name}", "") for split in splits)
        table.add_row(name, *(_readable(name, value) for value in values))
    console.print(table)
    console.print(plain(verdict(result.parity)), soft_wrap=True)
    if stop := result.stopped_early:
        where = f" in epoch {stop['best_epoch']}" if stop["best_epoch"] else ""
        best = "not finite" if stop["best"] is None else f"{stop['best']:.4g}"
        line = (
            f"stopped early, in epoch {stop['epoch']} of {stop['of_epochs']}: {stop['monitor']} "
            f"was best{where} ({best}), and has not improved in "
            f"{stop['validations_without_improvement']} validations since"
        )
        console.print(plain(line), soft_wrap=True)
    timing = result.timing
    if timing.get("train_s"):
        console.print(
            f"trained on {result.samples.get('train_seen', 0)} samples "
            f"in {timing['train_s']:.1f} s "
            f"({timing.get('samples_per_s', 0):.0f} samples/s, {result.world_size} process"
            f"{'es' if result.world_size > 1 else ''})",
            highlight=False,
        )
    look = f"tensorboard --logdir {run_dir}" if has_events(run_dir) else str(run_dir / METRICS)
    for line in (f"run directory: {run_dir}", f"look at it:    {look}"):
        console.print(plain(line), soft_wrap=True)
    append(run_dir, console.export_text())


def _readable(name: str, value: float | str | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value  # averaged weights are validated alone
    name = name.removeprefix("ema_")
    if name not in SPLIT_METRICS:
        return f"{value:.4g}"  # in a unit of its own
    return f"{value:.4g} nats" if name in ("loss", "nll") else f"{100 * value:.2f} %"


def verdict(parity: dict[str, Any]) -> str:
    """One line on whether the formulations matched.

    >>> verdict({})
    'parity: not checked'
    """
    if not parity.get("steps"):
        return "parity: not checked"
    formulations = {name: worst for name, worst in parity.items() if isinstance(worst, dict)}
    if parity["agree"]:
        largest = max((worst["ratio"] or 0.0 for worst in formulations.values()), default=0.0)
        outside = {n: f["out_of_domain"] for n, f in formulations.items() if f.get("out_of_domain")}
        more = "".join(f"; {rows} rows out of the domain of {n}" for n, rows in outside.items())
        ratio = parity.get("trained_ratio", 0.0)  # null where an error was not finite
        other = "; the loss that trained is another function" * (ratio is None or ratio > 1)
        return (
            f"parity: {', '.join(formulations)} match at {parity['steps']} steps "
            f"(largest error {largest:.2g} of its bound{more}){other}"
        )
    wrong = [name for name, worst in formulations.items() if not worst["agree"]]
    return f"parity: DIFFERS: {', '.join([*wrong, *beyond(parity)])}"
