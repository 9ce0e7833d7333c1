"""Plots of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor


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
