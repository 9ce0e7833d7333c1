"""What a screen shows of a run under way: a bar, or lines, and the network's layers."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichModelSummary
from rich import box, get_console
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

SHOWN = ("train/loss", "val/loss", "val/acc")
HEADS = ("Name", "Type", "Params")
# Letters of the bar itself, and of all that stands before the values.
BAR, BEFORE = 12, 66
# Letters of a line in a notebook.
WIDTH = 120
# Seconds between two looks at how far the run is: each costs as much as a small network's layer.
INTERVAL = 0.1


class LiveProgress(Callback):
    """A bar of the whole run's steps with the time that is left, and one of an evaluation."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Begin where the run begins, or goes on."""
        if trainer.is_global_zero:
            self._begin(pl_module.total_steps, pl_module.global_step, "steps")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, *_: Any
    ) -> None:
        """Show the step, now and then."""
        if self._bar is not None and time.monotonic() - self._shown > INTERVAL:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Show the newest values."""
        if self._bar is not None:
            self._show(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """A bar of the evaluation's batches."""
        if trainer.is_global_zero:
            self._begin(int(sum(trainer.num_test_batches)), 0, "batches")

    def on_test_batch_end(self, *_: Any) -> None:
        """One batch more."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
            if time.monotonic() - self._shown > INTERVAL:
                self._draw(self._bar)

    def on_exception(self, *_: Any) -> None:
        """Leave the terminal as it was."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: Classifier, stage: str) -> None:  # type: ignore[override]
        """Leave the terminal as it was."""
        self._end()

    def _begin(self, total: int, done: int, unit: str) -> None:
        self._end()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console(),
        )
        description = "training" if unit == "steps" else "testing"
        self._bar.add_task(description, total=total, completed=done, values="")
        self._start(self._bar)

    def _console(self) -> Console:
        return get_console()

    def _start(self, bar: Progress) -> None:
        bar.start()

    def _show(self, trainer: Trainer, classifier: Classifier) -> None:
        assert self._bar is not None
        self._bar.update(
            self._bar.task_ids[0],
            description=epoch_of(trainer),
            completed=classifier.global_step,
            values=_text(classifier, self._bar.console.width - BEFORE),
        )
        self._draw(self._bar)

    def _draw(self, bar: Progress) -> None:
        """Rich draws a bar on a terminal by itself."""
        self._shown = time.monotonic()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class NotebookProgress(LiveProgress):
    """The same bars where Jupyter displays them: an output that is written anew.

    Rich's own need ipywidgets for that.
    """

    def _console(self) -> Console:
        return Console(file=io.StringIO(), width=WIDTH, force_jupyter=False, force_terminal=False)

    def _start(self, bar: Progress) -> None:
        from IPython import display  # there is a kernel, and so there is this

        show: Any = display.display
        self._output = show({"text/plain": ""}, raw=True, display_id=True)
        self._draw(bar)

    def _draw(self, bar: Progress) -> None:
        super()._draw(bar)
        with bar.console.capture() as captured:
            bar.console.print(bar.get_renderable())
        self._output.update({"text/plain": captured.get().rstrip()}, raw=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._draw(self._bar)
        self._bar = None


class EpochLines(Callback):
    """One line for each epoch, for logs and pipes."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Print the newest values."""
        if trainer.is_global_zero:
            print(f"{epoch_of(trainer)}: {_text(pl_module)}", flush=True)


class NetworkSummary(RichModelSummary):
    """The network's modules and parameters; Lightning's table has columns that nothing fills."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print a row for each module, and the number of parameters."""
        columns = dict(summary_data)
        table = Table(box=box.SIMPLE_HEAD)
        for head in HEADS:
            table.add_column(head, justify="right" if head == "Params" else "left")
        for name, kind, number in zip(*(columns[h] for h in HEADS), strict=True):
            if name.partition(".")[0] == "model":  # the loss and the metrics have none
                table.add_row(name, kind, number)
        get_console().print(table)
        frozen = trainable_parameters < total_parameters
        learn = f", {trainable_parameters:,} of them learn" if frozen else ""
        print(f"{total_parameters:,} parameters{learn}", flush=True)


def fitting() -> Callback:
    """What fits where this process prints: a bar in a notebook or on a terminal, or lines.

    A bar redraws itself, which a pipe does not.
    """
    if get_console().is_jupyter:
        return NotebookProgress()
    return LiveProgress() if sys.stdout.isatty() else EpochLines()


def epoch_of(trainer: Trainer) -> str:
    """Which epoch it is, of how many: counted from 1."""
    known = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if known else "")


def _text(classifier: Classifier, room: int = 200) -> str:
    """The newest values, as many as there is room for."""
    scalars = classifier.progress.scalars
    parts = [f"{name} {scalars[name]:.4f}" for name in SHOWN if name in scalars]
    while parts and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)
