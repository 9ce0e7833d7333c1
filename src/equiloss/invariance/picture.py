"""The proof's picture: errors of one step's gradient, and of a hundred steps' losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiloss.invariance import gradients, steps, trajectories
from equiloss.invariance.cells import Report

# Okabe & Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
GREENS = ("#009E73", "#56B4E9", "#CC79A7")
# Where a logarithmic axis shows "the same bits".
FLOOR = 1e-17


def draw(report: Report, path: Path) -> None:
    """Draw the parts on gradients and trajectories that were measured; nothing without either."""
    known = {"gradients_float64": _gradients, "trajectories": _trajectories}
    panels = [panel for part, panel in known.items() if part in report.parts]
    if not panels:
        return
    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), number), report)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _gradients(axes: Axes, report: Report) -> None:
    """Errors of one step, a column of dots for each number of processes."""
    exact, single = (report.parts[f"gradients_{dtype}"].cells for dtype in ("float64", "float32"))
    controls = [replace(cell, figure=cell.control or 0.0) for cell in exact if cell.control_differs]
    series = (
        ("float64", BLUE, -0.22, exact),
        ("float32", ORANGE, 0.0, single),
        ("usual: mean of local means", VERMILION, 0.22, controls),
    )
    for label, colour, shift, cells in series:
        places = [int(cell.column[2]) + shift for cell in cells]
        heights = [max(cell.figure, FLOOR) for cell in cells]
        axes.scatter(places, heights, s=14, color=colour, alpha=0.6, label=label, linewidths=0)
    for bound, colour in zip(gradients.BOUNDS.values(), (BLUE, ORANGE), strict=True):
        axes.axhline(bound, color=colour, linewidth=1, linestyle="--")
    axes.set(
        yscale="log",
        ylim=(FLOOR / 2, 3),
        xticks=steps.WORLD_SIZES,
        xlabel="processes",
        ylabel="gradient of one step: relative error",
        title=f"One step in {len(exact)} ways to split it",
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


def _trajectories(axes: Axes, report: Report) -> None:
    """Relative difference of the loss at each step, a curve for each split of the work."""
    series = report.parts["trajectories"].series
    styles = {"m=1": "-", "m=4": ":"}
    for name, differences in series.items():
        if not name.startswith("loss, "):
            continue
        label = name.removeprefix("loss, ")
        heights = [max(value, FLOOR) for value in differences]
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
    """Label the floor of a logarithmic axis 0, for the same bits."""
    powers = range(-16, 1, 2)
    labels = [f"$10^{{{power}}}$" for power in powers]
    axes.set_yticks([FLOOR, *(10.0**power for power in powers)], ["0", *labels])
