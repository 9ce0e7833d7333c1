"""Where the time of a fit goes, by stage, and a trace of it that Perfetto opens."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler
from rich.table import Table

from equiloss.records.atomic import write_atomically
from equiloss.records.run_dir import TRACE

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

# Parts of Lightning's names of what it does, with the stage that it belongs to; the first that
# fits counts.
STAGES = {
    "[Callback]ParityMonitor": "parity",
    "[Callback]": "callbacks",
    "dataloader_next": "data",
    "batch_transfer": "data",
    "batch_to_device": "data",
    "backward": "backward",
    "optimizer": "optimizer",
    "checkpoint": "callbacks",
    "validation": "evaluation",
    "val_next": "evaluation",
    "test": "evaluation",
}
REST = "loop"
# Events of a trace, which is to open in seconds.
EVENTS = 200_000
# Complete events of one thread.
WHERE = {"ph": "X", "pid": 0, "tid": 0}


class _Event(NamedTuple):
    name: str
    stage: str
    began: float
    seconds: float


class Stages(Profiler):
    """Adds up the time of each stage, without that of the stages inside it.

    >>> stages = Stages()
    >>> with stages.profile("[Strategy]SingleDeviceStrategy.backward"):
    ...     with stages.profile("[Callback]Mine.on_after_backward"):
    ...         pass
    >>> stages.calls["backward"], stages.calls["callbacks"]
    (1, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.events: list[_Event] = []
        self._open: list[tuple[str, str, float]] = []
        self._inside = [0.0]

    def start(self, action_name: str) -> None:
        """A piece of work begins."""
        found = (stage for part, stage in STAGES.items() if part in action_name)
        stage = next(found, action_name if action_name in OWN else REST)
        self._inside.append(0.0)
        self._open.append((action_name, stage, time.perf_counter()))

    def stop(self, action_name: str) -> None:
        """The piece of work that began last has ended."""
        name, stage, began = self._open.pop()
        seconds = time.perf_counter() - began
        self.seconds[stage] += seconds - self._inside.pop()
        self._inside[-1] += seconds
        self.calls[stage] += 1
        if len(self.events) < EVENTS:
            self.events.append(_Event(name, stage, began, seconds))

    def wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count for a stage."""

        def call(*args: Any, **keywords: Any) -> Any:
            with self.profile(stage):
                return function(*args, **keywords)

        return call

    def table(self, steps: int) -> Table:
        """Stages by their time, the longest first."""
        total = sum(self.seconds.values()) or 1.0
        table = Table("stage", title=f"{steps} steps: where the time went")
        for head in ("share", "s", "ms per step", "calls"):
            table.add_column(head, justify="right")
        for stage, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1]):
            per_step = 1000 * seconds / max(steps, 1)
            figures = (f"{seconds / total:.1%}", f"{seconds:.3f}", f"{per_step:.3f}")
            table.add_row(stage, *figures, str(self.calls[stage]))
        return table

    def trace(self) -> str:
        """What Perfetto (ui.perfetto.dev) and chrome://tracing open, in microseconds."""
        events = [
            dict(WHERE, name=name, cat=stage, ts=round(began * 1e6, 1), dur=round(seconds * 1e6, 1))
            for name, stage, began, seconds in self.events
        ]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


OWN = ("forward", "loss", "logging")
"""Stages of our own step, which Lightning does not see."""


class Profile(Callback):
    """Has `Stages` see the parts of our own step, and writes down what was seen.

    Args:
        stages: The Trainer's profiler.
        directory: The run directory.
        show: Prints a table.
    """

    def __init__(self, stages: Stages, directory: Path, show: Callable[[Table], None]) -> None:
        self.stages = stages
        self.directory = directory
        self.show = show

    def on_fit_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Watch network, loss and log from here on."""
        wrapped = self.stages.wrapped
        # Past nn.Module's own attributes.
        object.__setattr__(pl_module, "outputs", wrapped("forward", pl_module.outputs))
        object.__setattr__(pl_module, "record", wrapped("logging", pl_module.record))
        backward = wrapped("backward", pl_module.manual_backward)
        object.__setattr__(pl_module, "manual_backward", backward)
        criterion = pl_module.criterion
        object.__setattr__(criterion, "forward", wrapped("loss", criterion.forward))

    def on_fit_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Print the table and write the trace, on the first rank."""
        if trainer.is_global_zero:
            write_atomically(self.directory / TRACE, self.stages.trace())
            self.show(self.stages.table(pl_module.global_step))
