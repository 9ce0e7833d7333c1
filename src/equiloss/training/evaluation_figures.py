"""The confusion matrix and the worst-classified images of the test split, for TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from equiloss.data.sampler import Slice
from equiloss.distributed import collectives
from equiloss.errors import first_line
from equiloss.records.plots import draw_confusion, label
from equiloss.records.tensorboard import RunTensorBoard

if TYPE_CHECKING:
    from equiloss.data.datasets import Batch, Splits
    from equiloss.training.classifier import Classifier

log = logging.getLogger(__name__)

WORST, COLUMNS = 16, 4
# Points, and inches: letters, a line of them, and the square for an image.
LETTERS = 8
LINE = 1.2 * LETTERS / 72
CELL = 2.0


class EvaluationFigures(Callback):
    """Draws the confusion matrix and the worst-classified images of the test split.

    Args:
        splits: The data, for class names and images.
    """

    def __init__(self, splits: Splits) -> None:
        self.splits = splits
        self._worst = torch.empty(0, 4, dtype=torch.float64)

    def on_test_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, outputs: Tensor, batch: Batch, *_: Any
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
        worst = _largest(collectives.gather_rows(self._worst)).cpu()
        self._worst = torch.empty(0, 4, dtype=torch.float64)
        if not trainer.is_global_zero:
            return
        confusion = pl_module.evaluated["test"].confusion.tolist()
        step = max(pl_module.global_step - 1, 0)
        names = self.splits.class_names
        figures: dict[str, Callable[[], Figure]] = {
            "test/confusion": lambda: draw_confusion(confusion, names),
            "test/worst_images": lambda: draw_worst(worst, self.splits),
        }
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                for tag, draw in figures.items():
                    try:
                        logger.add_figure(tag, draw(), step)
                    except Exception as error:  # a picture decides no run, whatever it fails at
                        log.warning("no picture %s: %s", tag, first_line(error))


def draw_worst(worst: Tensor, splits: Splits) -> Figure:
    """Images with the largest loss: rows (nll, index, true class, predicted class) [n, 4].

    On axes of its own for each image, with a layout to be found for them, this would take four
    times as long, and half of a short run's time.
    """
    images = splits.test.__getitems__(Slice(0, worst[:, 1].long())).images  # [n, C, H, W]
    titles = []
    for nll, _, *classes in worst.tolist():
        right, taken = (label(splits.class_names[int(each)], 24) for each in classes)
        titles.append(f"{right}, taken for\n{taken}: {nll:.2f} nats")
    # In inches, since that is what letters have; an image fits into a square.
    height, width = (0.95 * CELL * side / max(images.shape[2:]) for side in images.shape[2:])
    above = LINE * (1 + max((title.count("\n") + 1 for title in titles), default=0))
    lines = max(-(-len(worst) // COLUMNS), 1)
    right_end, lower_end = COLUMNS * CELL, lines * (above + height)
    figure = Figure(figsize=(right_end, lower_end))
    axes = figure.add_axes((0, 0, 1, 1))
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        line, column = divmod(place, COLUMNS)
        middle, top = (column + 0.5) * CELL, line * (above + height) + above
        box = (middle - width / 2, middle + width / 2, top + height, top)
        # Of channels that are no colours their mean is shown.
        shown = image if len(image) == 3 else image.float().mean(0, keepdim=True)
        pixels = shown.permute(1, 2, 0).numpy()  # [C, H, W] -> [H, W, C]
        axes.imshow(pixels, cmap="gray", extent=box, aspect="auto")
        axes.text(middle, top - LINE / 4, title, ha="center", va="bottom", fontsize=LETTERS)
    axes.set(xlim=(0, right_end), ylim=(lower_end, 0))
    axes.set_axis_off()
    return figure


def _largest(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort(descending=True)[:WORST]]
