"""TensorBoard's event files of a run, with hparams, chart layout and config beside the scalars."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from equiloss.records.run_dir import EVENTS
from equiloss.records.writing import writing

log = logging.getLogger(__name__)

# Time for the writer's thread to write what it still has.
CLOSE_SECONDS = 30.0
# Each event that is handed to that thread wakes it, and training waits for it: so they go together.
HELD_SECONDS = 1.0
MOST_QUEUED = 10_000

# The same keys for every loss, so that the HPARAMS tab keeps its columns in a sweep over losses.
HPARAMS = (
    "seed",
    "loss.name",
    "loss.label_smoothing",
    "loss.weight",
    "data.name",
    "data.batch_size",
    "model.name",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "trainer.devices",
    "trainer.micro_batch_size",
    "trainer.precision",
)
# What runs with different losses can be compared by; val/loss is another thing for each of them.
COMPARABLE = ("val/nll", "val/acc", "test/nll", "test/acc")
# The tab shows five columns until it is told to show more.
FIRST = ("loss.name", "loss.options", "optimizer.lr", "seed", "trainer.devices")
NULLABLE = ("loss.label_smoothing", "loss.weight", "trainer.micro_batch_size")


class RunTensorBoard(TensorBoardLogger):
    """Event files in the run directory itself, with hparams, chart layout and config.

    Args:
        directory: The run directory.
        config: The resolved configuration.
        config_text: The same, as YAML.
        metrics: Names of the metrics that may be logged.
        formulations: Losses whose parity errors share a chart.
        first_step: Step from which on an earlier attempt's scalars are void, or None.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, Any],
        config_text: str,
        metrics: Sequence[str],
        formulations: Sequence[str],
        first_step: int | None = None,
    ) -> None:
        super().__init__(
            directory,
            name="",
            version="",
            default_hp_metric=False,
            purge_step=first_step,
            max_queue=MOST_QUEUED,
        )
        self._config = config
        self._config_text = config_text
        self._metrics = metrics
        self._formulations = formulations
        self._events = directory / EVENTS
        self._held: list[tuple[Summary, int | None, float]] = []
        self._handed_over = 0.0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the event file, with a description of the run, while the context lasts.

        Raises:
            FileError: here as in every method, if the file cannot be written.
        """
        hook = threading.excepthook

        def but_of_files(failed: threading.ExceptHookArgs) -> None:
            # The writer's thread would print a traceback of what is raised here at the next call.
            if not isinstance(failed.exc_value, OSError):
                hook(failed)

        threading.excepthook = but_of_files
        try:
            with writing(self._events):
                self._describe_run()
            try:
                yield
            finally:
                self.close()
        finally:
            threading.excepthook = hook

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars as one event: an event for each takes four times as long."""
        scalars = [Summary.Value(tag=tag(name), simple_value=metrics[name]) for name in metrics]
        now = time.time()
        self._held.append((Summary(value=scalars), step, now))
        if not 0 <= now - self._handed_over < HELD_SECONDS:
            with writing(self._events):
                self._hand_over()

    def _hand_over(self) -> None:
        held, self._held = self._held, []
        for event in held:
            self.experiment._get_file_writer().add_summary(*event)
        self._handed_over = time.time()

    @rank_zero_only
    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a figure."""
        with writing(self._events):
            self.experiment.add_figure(tag, figure, step)

    @rank_zero_only
    def _describe_run(self) -> None:
        """Write hparams, chart layout and config; the metrics' values come with the scalars."""
        writer = self.experiment
        values = hparam_values(self._config)
        shown = [name for name in COMPARABLE if name in self._metrics]
        for summary in hparams(values, dict.fromkeys(shown)):  # type: ignore[no-untyped-call]
            _put_first(summary)
            writer.file_writer.add_summary(summary)
        writer.add_custom_scalars(chart_layout(self._formulations))
        writer.add_text("config", f"```yaml\n{self._config_text}```", 0)
        writer.flush()

    @rank_zero_only
    def save(self) -> None:
        """Flush. Lightning would write an hparams.yaml beside our config.yaml."""
        self._in_time(self._flush)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush; the test after a fit goes on in the same file."""
        self._in_time(self._flush)

    @rank_zero_only
    def close(self) -> None:
        """Close the event file; one whose file system hangs is left as it is."""
        self._in_time(self._close)

    def _flush(self) -> None:
        self._hand_over()
        self.experiment.flush()

    def _close(self) -> None:
        try:
            self._hand_over()
        finally:
            self.experiment.close()

    def _in_time(self, act: Callable[[], None]) -> None:
        """Do what waits for the writer's thread, but no longer than `CLOSE_SECONDS`."""
        done: Future[None] = Future()

        def work() -> None:
            try:
                act()
                done.set_result(None)
            except Exception as error:  # raised below
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            with writing(self._events):
                done.result(CLOSE_SECONDS)
        except TimeoutError:
            log.warning("%s is not whole: writing it takes too long", self._events)


def tag(name: str) -> str:
    """A metric's name in TensorBoard, which lists them in the order of the alphabet.

    What people look at comes before what proves that it is right.

    >>> tag("val/nll"), tag("parity/max_ratio")
    ('val/nll', 'verification/max_ratio')
    """
    return name.replace("parity/", "verification/", 1) if name.startswith("parity/") else name


def _put_first(summary: Summary) -> None:
    """Mark the columns of `FIRST` as those in which runs differ: the tab shows these."""
    for value in summary.value:
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in FIRST
        value.metadata.plugin_data.content = data.SerializeToString()


def hparam_values(config: Mapping[str, Any]) -> dict[str, bool | str | float]:
    """Values of `HPARAMS`, and the loss's own options in one text.

    >>> values = hparam_values({"seed": 1, "loss": {"name": "poly1", "epsilon": 2.0}})
    >>> values["loss.name"], values["loss.options"], values["loss.weight"]
    ('poly1', 'epsilon=2.0', 'null')
    """
    values: dict[str, bool | str | float] = {}
    for key in HPARAMS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # A column needs one type: what may be null, or a list, is text in every run.
        numeric = isinstance(value, (int, float)) and key not in NULLABLE
        values[key] = value if numeric or isinstance(value, str) else json.dumps(value)
    common = ("name", "label_smoothing", "weight", "ignore_index")
    own = [f"{key}={json.dumps(v)}" for key, v in config["loss"].items() if key not in common]
    return values | {"loss.options": ", ".join(own)}


def chart_layout(formulations: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Custom charts: all formulations' errors together, and training beside validation."""
    return {
        "verification": {
            title: ["Multiline", [tag(f"parity/{name}/{key}$") for name in formulations]]
            for title, key in (
                ("loss error (nats)", "loss_error"),
                ("gradient error (mass × d loss / d logits)", "grad_error"),
                ("error / bound", "ratio"),
            )
        },
        "training": {
            "loss (nats)": ["Multiline", ["train/loss$", "val/loss$"]],
            "accuracy": ["Multiline", ["val/acc$"]],
        },
    }
