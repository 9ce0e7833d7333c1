"""The proof as a picture: errors of one step, and of a hundred."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiloss.invariance import gradients, steps, trajectories
from equiloss.invariance.cells import Cell, Report

# Okabe & Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
GREENS = ("#009E73", "#56B4E9", "#CC79A7")
# Where a logarithmic axis shows "the same bits".
FLOOR = 1e-17


def draw(report: Report, path: Path) -> None:
    """Draw what was measured of gradients and trajectories; nothing if neither was."""
    panels = [
        panel
        for panel, part in ((_gradients, "gradients_float64"), (_trajectories, "trajectories"))
        if part in report.parts
    ]
    if not panels:
        return
    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), number), report)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _gradients(axes: Axes, report: Report) -> None:
    """A column of dots for each number of processes."""
    series = (
        ("float64", BLUE, -0.22, [(c, c.figure) for c in _cells(report, "float64")]),
        ("float32", ORANGE, 0.0, [(c, c.figure) for c in _cells(report, "float32")]),
        (
            "usual: mean of local means",
            VERMILION,
            0.22,
            [(c, c.control or 0.0) for c in _cells(report, "float64") if c.control_differs],
        ),
    )
    for label, colour, shift, points in series:
        places = [int(cell.column[2]) + shift for cell, _ in points]
        heights = [max(figure, FLOOR) for _, figure in points]
        axes.scatter(places, heights, s=14, color=colour, alpha=0.6, label=label, linewidths=0)
    for bound, colour in zip(gradients.BOUNDS.values(), (BLUE, ORANGE), strict=True):
        axes.axhline(bound, color=colour, linewidth=1, linestyle="--")
    axes.set(
        yscale="log",
        ylim=(FLOOR / 2, 3),
        xticks=steps.WORLD_SIZES,
        xlabel="processes",
        ylabel="gradient of one step: relative error",
        title=f"One step in {len(_cells(report, 'float64'))} ways to split it",
    )
    _mark_zero(axes)
    # Between the errors of float32 and the bound of float64 there is nothing.
    axes.legend(
        loc="center left",
        bbox_to_anchor=(0.0, 0.46),
        ncols=3,
        fontsize=8,
        columnspacing=1,
        title="dashed: the bound",
        title_fontsize=8,
    )


def _cells(report: Report, dtype: str) -> Sequence[Cell]:
    return report.parts[f"gradients_{dtype}"].cells


def _trajectories(axes: Axes, report: Report) -> None:
    """The loss's divergence step by step."""
    series = report.parts["trajectories"].series
    styles = {"m=1": "-", "m=4": ":"}
    for name, apart in series.items():
        if not name.startswith("loss, "):
            continue
        label = name.removeprefix("loss, ")
        heights = [max(value, FLOOR) for value in apart]
        if label == trajectories.CONTROL:
            axes.plot(heights, color=VERMILION, label="W=2, usual: mean of local means")
            continue
        world_size, micro = label.split(", ")
        colour = (BLUE, *GREENS)[int(world_size[2:]) - 1]
        axes.plot(heights, color=colour, linestyle=styles[micro], linewidth=1, label=label)
    axes.axhline(trajectories.BOUND, color="black", linewidth=1, linestyle="--", label="bound")
    axes.set(
        yscale="log",
        ylim=(FLOOR / 2, 10),
        xlabel="optimizer step",
        ylabel="loss: relative difference to one process",
        title="A hundred steps, float64 (W processes, m micro-batches)",
    )
    _mark_zero(axes)
    axes.legend(fontsize=8, ncols=3, loc="center", bbox_to_anchor=(0.5, 0.56))


def _mark_zero(axes: Axes) -> None:
    """Name the floor of a logarithmic axis what it stands for: the same bits."""
    powers = range(-16, 1, 2)
    labels = [f"$10^{{{power}}}$" for power in powers]
    axes.set_yticks([FLOOR, *(10.0**power for power in powers)], ["0", *labels])
