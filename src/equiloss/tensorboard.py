"""What TensorBoard shows of a run beside its scalars: hparams, chart layout, config, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from equiloss.losses import reduction

if TYPE_CHECKING:
    from equiloss.classifier import Classifier
    from equiloss.data.datasets import Batch, Splits

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
# The tab shows five columns until it is told to show more.
FIRST = ("loss.name", "loss.options", "optimizer.lr", "seed", "trainer.devices")
NULLABLE = ("loss.label_smoothing", "loss.weight", "trainer.micro_batch_size")
WORST = 16


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
            directory, name="", version="", default_hp_metric=False, purge_step=first_step
        )
        self._config = config
        self._config_text = config_text
        self._metrics = metrics
        self._formulations = formulations

    @rank_zero_only
    def describe_run(self) -> None:
        """Write hparams, chart layout and config; the metrics' values come with the scalars."""
        writer = self.experiment
        values = hparam_values(self._config)
        # The tab shows its first columns: what a sweep is judged by.
        metrics = sorted(self._metrics, key=lambda name: not name.startswith(("test/", "val/")))
        for summary in hparams(values, dict.fromkeys(metrics)):  # type: ignore[no-untyped-call]
            _put_first(summary)
            writer.file_writer.add_summary(summary)
        writer.add_custom_scalars(chart_layout(self._formulations))
        writer.add_text("config", f"```yaml\n{self._config_text}```", 0)
        writer.flush()

    @rank_zero_only
    def save(self) -> None:
        """Flush. Lightning would write an hparams.yaml beside our config.yaml."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush; the test after a fit goes on in the same file."""
        self.experiment.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the event file."""
        self.experiment.close()


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
    ('poly1', '{"epsilon": 2.0}', 'null')
    """
    values: dict[str, bool | str | float] = {}
    for key in HPARAMS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # A column needs one type: what may be null, or a list, is text in every run.
        numeric = isinstance(value, (int, float)) and key not in NULLABLE
        values[key] = value if numeric or isinstance(value, str) else json.dumps(value)
    loss = dict(config["loss"])
    for key in ("name", "label_smoothing", "weight", "ignore_index"):
        loss.pop(key, None)
    values["loss.options"] = json.dumps(loss)
    return values


def chart_layout(formulations: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Custom charts: all formulations' parity errors together, and training beside validation."""
    return {
        "parity": {
            title: ["Multiline", [f"parity/{name}/{key}$" for name in formulations]]
            for title, key in (
                ("loss error (nats)", "loss_error"),
                ("gradient error (mass × d loss / d logits)", "grad_error"),
                ("error / bound", "ratio"),
            )
        },
        "training": {
            "loss (nats)": ["Multiline", ["train/loss$", "val/loss$"]],
            "accuracy": ["Multiline", ["val/acc$", "val/balanced_acc$", "val/acc_top5$"]],
        },
    }


class EvaluationFigures(Callback):
    """Draws the confusion matrix and the worst-classified images of the test split.

    Args:
        splits: The data, for class names and images.
    """

    def __init__(self, splits: Splits) -> None:
        self.splits = splits
        self._worst = torch.empty(0, 4, dtype=torch.float64)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        outputs: Tensor,  # type: ignore[override]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows with the largest negative log-likelihood."""
        logits, target = outputs.float(), batch.target
        if target.is_floating_point():
            target = target.argmax(-1)
        ignore_index = pl_module.criterion.ignore_index
        if ignore_index is None:
            ignore_index = -100
        # An ignored row has loss 0 and sorts last.
        nll = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
        columns = (nll, batch.index, target, logits.argmax(-1))
        rows = torch.stack([column.double() for column in columns], dim=1)  # [n, 4]
        self._worst = _largest(torch.cat([self._worst.to(rows.device), rows]))

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Draw, on the first rank; every rank takes part in the gathering."""
        worst = _largest(reduction.gather_rows(self._worst)).cpu()
        self._worst = torch.empty(0, 4, dtype=torch.float64)
        if not trainer.is_global_zero:
            return
        confusion = pl_module.evaluated["test"].confusion.cpu()
        step = max(pl_module.step_index - 1, 0)
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                names = self.splits.class_names
                logger.experiment.add_figure(
                    "test/confusion", draw_confusion(confusion, names), step
                )
                figure = draw_worst(worst, self.splits)
                logger.experiment.add_figure("test/worst_images", figure, step)


def draw_confusion(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Confusion matrix [K, K] with rows of true classes, coloured by share of the row."""
    classes = len(class_names)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(3 + 0.4 * classes, 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= 30:
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                count = int(confusion[row, column])
                if count:
                    # The colour map is dark below one half.
                    colour = "white" if share[row, column] < 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure


def draw_worst(worst: Tensor, splits: Splits) -> Figure:
    """Images with the largest loss: rows (nll, index, true class, predicted class) [n, 4]."""
    from equiloss.data.sampler import Slice

    columns = 4
    lines = max(-(-len(worst) // columns), 1)
    figure = Figure(figsize=(2 * columns, 2.5 * lines), layout="constrained")
    images = splits.test.__getitems__(Slice(0, worst[:, 1].long())).images  # [n, C, H, W]
    for place, (image, row) in enumerate(zip(images, worst.tolist(), strict=True), start=1):
        nll, _, target, predicted = row
        axes = figure.add_subplot(lines, columns, place)
        picture = image.permute(1, 2, 0).numpy()  # [C, H, W] -> [H, W, C]
        axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
        axes.set_title(
            f"{splits.class_names[int(target)]}, taken for\n"
            f"{splits.class_names[int(predicted)]}: {nll:.2f} nats",
            fontsize=8,
        )
        axes.set_axis_off()
    return figure


def _largest(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort(descending=True)[:WORST]]
