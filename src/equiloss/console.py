"""What a person sees of a run: progress while it goes on, a table at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from equiloss.config import SPLIT_METRICS
from equiloss.results import Result

if TYPE_CHECKING:
    from equiloss.classifier import Classifier

SHOWN = ("train/loss", "val/loss", "val/acc")


def is_live() -> bool:
    """Whether a bar that redraws itself has a terminal to do so."""
    return sys.stdout.isatty()


class LiveProgress(RichProgressBar):
    """Lightning's bar with the newest loss and accuracy."""

    def get_metrics(self, trainer: Trainer, pl_module: Classifier) -> dict[str, Any]:  # type: ignore[override]
        """The newest values, without Lightning's version number."""
        return {name: f"{value:.4f}" for name, value in _shown(pl_module)}


class EpochLines(Callback):
    """One line for each epoch, for logs and pipes."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Print the newest values."""
        if trainer.is_global_zero:
            values = "  ".join(f"{name} {value:.4f}" for name, value in _shown(pl_module))
            print(f"epoch {trainer.current_epoch + 1}: {values}", flush=True)


def _shown(classifier: Classifier) -> list[tuple[str, float]]:
    return [(name, classifier.scalars[name]) for name in SHOWN if name in classifier.scalars]


def show(result: Result, run_dir: Path) -> None:
    """Print the final metrics, the parity verdict, and where everything is."""
    console = Console()
    table = Table(title=f"{result.loss['name']}: {result.status}")
    table.add_column("metric")
    splits = [split for split in ("val", "test") if f"{split}/loss" in result.metrics]
    for split in splits:
        table.add_column(split, justify="right")
    for name in SPLIT_METRICS:
        table.add_row(name, *(_readable(name, result.metrics[f"{s}/{name}"]) for s in splits))
    console.print(table)
    console.print(verdict(result.parity), soft_wrap=True, highlight=False)
    timing = result.timing
    if timing.get("train_s"):
        console.print(
            f"trained on {result.samples['train_seen']} samples in {timing['train_s']:.1f} s "
            f"({timing['samples_per_s']:.0f} samples/s, {result.world_size} process"
            f"{'es' if result.world_size > 1 else ''})",
            highlight=False,
        )
    console.print(f"run directory: {run_dir}", soft_wrap=True, highlight=False)
    console.print(f"look at it:    tensorboard --logdir {run_dir}", soft_wrap=True, highlight=False)


def _readable(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g} nats" if name in ("loss", "nll") else f"{100 * value:.2f} %"


def verdict(parity: dict[str, Any]) -> str:
    """One line on whether the formulations matched.

    >>> verdict({})
    'parity: not checked'
    """
    if not parity.get("steps"):
        return "parity: not checked"
    formulations = {name: found for name, found in parity.items() if isinstance(found, dict)}
    if parity["agree"]:
        worst = max(found["ratio"] for found in formulations.values())
        outside = {n: f["out_of_domain"] for n, f in formulations.items() if f["out_of_domain"]}
        beyond = "".join(f"; {rows} rows out of the domain of {n}" for n, rows in outside.items())
        return (
            f"parity: {', '.join(formulations)} match at {parity['steps']} steps "
            f"(largest error {worst:.2g} of its bound{beyond})"
        )
    wrong = [name for name, found in formulations.items() if not found["agree"]]
    return f"parity: DIFFERS: {', '.join(wrong) or 'mass or all-reduced loss'}"
