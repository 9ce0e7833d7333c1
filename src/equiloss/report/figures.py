"""The report's pictures. None is drawn of what was not measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from equiloss.report.compare import TIMING, Comparison
from equiloss.report.groups import Group
from equiloss.report.pairs import largest
from equiloss.report.panels import (
    COLOURS,
    DPI,
    legend_below,
    logarithmic,
    matrix,
    panels_in_rows,
    styles,
    width,
)
from equiloss.report.runs import Run, Series
from equiloss.report.verdict import EXACT, FLOAT64_BOUND

# Curves beyond this number hide each other; the table has them all.
MOST = 12
MATRICES = 6


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str
    title: str
    caption: str
    draw: Callable[[Comparison], Figure | None]
    most: int = MOST
    """Groups that are drawn at most; 0 where it draws no groups."""


def draw_all(comparison: Comparison, directory: Path) -> list[Picture]:
    """Draw every picture that there are figures for; an older one of the same name goes."""
    drawn = []
    for picture in PICTURES:
        file = directory / f"{picture.name}.png"
        file.unlink(missing_ok=True)
        figure = picture.draw(comparison)
        if figure is not None:
            figure.savefig(file, dpi=DPI, metadata={"Software": None})
            drawn.append(picture)
    return drawn


def _curves(comparison: Comparison) -> Figure | None:
    """Learning curves: mean over seeds, and the range between them."""
    panels = (
        ("train/loss", "training loss (nats)", "log"),
        ("val/nll", "validation nll (nats)", "log"),
        ("val/acc", "validation accuracy", "linear"),
    )
    groups = comparison.groups[:MOST]
    if not any(group.curve(name) for group in groups for name, _, _ in panels):
        return None
    figure, places = panels_in_rows(len(panels), 3, height=3.1)
    for axes, (name, label, scale) in zip(places, panels, strict=True):
        axes.set(xlabel="optimizer step", ylabel=label)
        drawn: list[float] = []
        for group, (_, style) in zip(groups, styles([g.label for g in groups]), strict=True):
            curve = [point for point in group.curve(name) if all(map(math.isfinite, point))]
            if curve:
                steps, means, lows, highs = zip(*curve, strict=True)
                # A single evaluation is a point, which a line does not show.
                marker = "o" if len(steps) == 1 else None
                axes.plot(steps, means, label=group.label, marker=marker, **style)
                axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
                drawn += means
        if scale == "log" and any(mean > 0 for mean in drawn):
            axes.set_yscale("log")
    legend_below(figure, places)
    return figure


def _parity(comparison: Comparison) -> Figure | None:
    """Errors of the formulations against the oracle, the largest of all runs at each step."""
    panels = (
        ("ratio", "error over its bound"),
        ("loss_error", "loss error (nats)"),
        ("grad_error", "gradient error"),
    )
    worst = {
        key: {
            name: [_largest_by_step(comparison, f"parity/{name}/{key}")]
            for name in comparison.ratios
        }
        for key, _ in panels
    }
    if not any(series for curves in worst.values() for (series,) in curves.values()):
        return None
    figure, places = panels_in_rows(len(panels), 3, height=3.1)
    looks = dict(styles(list(comparison.ratios)))
    for axes, (key, label) in zip(places, panels, strict=True):
        logarithmic(axes, worst[key], looks, bound=1.0 if key == "ratio" else None)
        axes.set(xlabel="optimizer step", ylabel=label)
    legend_below(figure, places)
    return figure


def _largest_by_step(comparison: Comparison, name: str) -> Series:
    by_step: dict[int, list[float]] = {}
    for run in comparison.found.runs:
        for step, value in run.metrics.get(name, []):
            by_step.setdefault(step, []).append(value)
    return [(step, largest(by_step[step]) or 0.0) for step in sorted(by_step)]


def _divergence(comparison: Comparison) -> Figure | None:
    """How far runs of one function are apart, step by step."""
    chosen: dict[tuple[str, bool, str], dict[str, list[Series]]] = defaultdict(dict)
    for pair in comparison.pairs:
        if pair.apart:
            curves = chosen[pair.kind, pair.precision != EXACT, pair.precision]
            if pair.what in curves or len(curves) < MOST:
                curves.setdefault(pair.what, []).append(pair.apart)
    if not chosen:
        return None
    figure, places = panels_in_rows(len(chosen), 2, height=3.4)
    looks = dict(styles(list(dict.fromkeys(w for curves in chosen.values() for w in curves))))
    # Several seeds have curves of one colour, which should not hide each other.
    several = any(len(found) > 1 for curves in chosen.values() for found in curves.values())
    for axes, (where, curves) in zip(places, sorted(chosen.items()), strict=True):
        kind, inexact, precision = where
        widths = {label: width(n) * (0.7 if several else 1) for n, label in enumerate(curves)}
        here = {label: {**looks[label], "linewidth": widths[label]} for label in curves}
        logarithmic(axes, curves, here, bound=None if inexact else FLOAT64_BOUND)
        axes.set(xlabel="optimizer step", ylabel="relative difference")
        axes.set_title(f"{kind}, {precision}", fontsize=10)
    legend_below(figure, places)
    return figure


def _confusion(comparison: Comparison) -> Figure | None:
    """Confusion matrices of the test split side by side, summed over seeds."""
    groups = [group for group in comparison.groups if _with(group, "confusion")][:MATRICES]
    if not groups:
        return None
    figure, places = panels_in_rows(len(groups), 3, height=3.9 if len(groups) > 3 else 3.6)
    for axes, group in zip(places, groups, strict=True):
        runs = _with(group, "confusion")
        names = runs[0].evaluation["class_names"]
        # Image folders may have changed between two runs: other classes cannot be added up.
        same = [run for run in runs if run.evaluation["class_names"] == names]
        matrices = [run.evaluation["test"]["confusion"] for run in same]
        counts = [
            [sum(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*matrices, strict=True)
        ]
        part = "" if len(same) == len(runs) else f" ({len(same)} of {len(runs)} runs)"
        axes.set_title(fill(group.label + part, 40), fontsize=9)
        matrix(axes, counts, [str(name) for name in names])
    for axes in places:
        axes.set_xlabel("predicted class")
    places[0].set_ylabel("true class")
    return figure


def _with(group: Group, figure: str) -> list[Run]:
    """The completed runs that have a figure of the test split."""
    return [run for run in group.completed if run.evaluation.get("test", {}).get(figure)]


def _calibration(comparison: Comparison) -> Figure | None:
    """Reliability: how often a prediction of some confidence is right."""
    bins = {}
    for group in comparison.groups:
        found = [run.evaluation["test"]["calibration"] for run in _with(group, "calibration")]
        points = [point for point in _points(found) if all(map(math.isfinite, point))]
        if points:
            bins[group.label] = points
    if not bins:
        return None
    figure, (axes, rows) = panels_in_rows(2, 2, height=3.4)
    for label, style in styles(list(bins)[:MOST]):
        xs, ys, counts = zip(*bins[label], strict=True)
        drawn = {"marker": "o", "markersize": style["linewidth"] + 2, "clip_on": False, **style}
        axes.plot(xs, ys, label=label, **drawn)
        rows.plot(xs, counts, **drawn)
    axes.plot((0, 1), (0, 1), color="black", linewidth=1, linestyle=":", label="calibrated")
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    rows.set(xlabel="confidence", ylabel="test samples", yscale="log", xlim=(0, 1))
    legend_below(figure, (axes,))
    return figure


def _points(found: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, float, float]]:
    """Mean confidence, share that is right, and rows of each bin, the runs added up."""
    added = (
        [sum(values) for values in zip(*(bins[key] for bins in found), strict=False)]
        for key in ("rows", "confidence", "right")
    )
    return [(c / n, r / n, n) for n, c, r in zip(*added, strict=True) if n]


def _time(comparison: Comparison) -> Figure | None:
    """Training time and throughput."""
    groups = [group for group in comparison.groups if any(map(group.spread, TIMING))][:MOST]
    if not groups:
        return None
    figure, places = panels_in_rows(2, 2, height=0.9 + 0.4 * len(groups))
    labels = ("training time (s)", "throughput (samples/s)")
    for axes, name, label in zip(places, TIMING, labels, strict=True):
        for place, group in enumerate(groups):
            spread = group.spread(name)
            if spread is not None:
                error = spread.deviation or 0.0
                axes.barh(place, spread.mean, xerr=error, capsize=3, color=COLOURS[5])
        axes.set(xlabel=label, ylim=(len(groups) - 0.5, -0.5))
        axes.set_yticks(range(len(groups)), [fill(group.label, 40) for group in groups], fontsize=9)
    places[1].set_yticklabels([])
    return figure


PICTURES = (
    Picture(
        "curves",
        "Learning curves",
        "Mean over seeds of the completed runs, and the range between the seeds.",
        _curves,
    ),
    Picture(
        "parity",
        "Parity",
        "Errors against the oracle at each parity step, the largest of all runs. The gradient is "
        "mass × d loss / d logits.",
        _parity,
        most=0,
    ),
    Picture(
        "divergence",
        "Divergence",
        "How far the training losses of runs that should take the same steps are apart, a curve "
        "for each seed, of at most 12 kinds of pairs in a panel; 0 is the same float64.",
        _divergence,
        most=0,
    ),
    Picture(
        "confusion",
        "Confusion matrices",
        "Of the test split, summed over seeds; the colour is the share of the true class.",
        _confusion,
        most=MATRICES,
    ),
    Picture(
        "calibration",
        "Reliability",
        "Of predictions with about the same confidence on the test split, how many are right.",
        _calibration,
    ),
    Picture("time", "Time and throughput", "Mean and standard deviation over seeds.", _time),
)
