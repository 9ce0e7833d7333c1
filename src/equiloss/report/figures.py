"""The report's pictures. None is drawn of what was not measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from equiloss.errors import first_line
from equiloss.records import plots
from equiloss.report import panels
from equiloss.report.compare import TIMING, Comparison
from equiloss.report.groups import Group, values_by_step
from equiloss.report.pairs import maximum
from equiloss.report.runs import Run, Series
from equiloss.report.verdict import EXACT, FLOAT64_BOUND

# Curves beyond this number hide each other; the table has them all.
MAX_CURVES = 12
MAX_MATRICES = 6


@dataclass(frozen=True)
class Picture:
    """A picture of the report, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Comparison], Figure | None]
    max_groups: int = MAX_CURVES
    """Groups that are drawn at most; 0 where it draws no groups."""


def draw_all(comparison: Comparison, directory: Path) -> list[Picture]:
    """Draw every picture that there are figures for; an older one of the same name goes.

    One that cannot be drawn is noted among what was skipped.
    """
    drawn = []
    for picture in PICTURES:
        file = directory / f"{picture.name}.png"
        file.unlink(missing_ok=True)
        try:
            if (figure := picture.draw(comparison)) is not None:
                figure.savefig(file, dpi=panels.DPI, metadata={"Software": None})
                drawn.append(picture)
        except OSError:
            raise
        except Exception as error:  # a picture ends no report, whatever Matplotlib fails at
            comparison.run_set.skipped[file.name] = f"is not drawn: {first_line(error)}"
    return drawn


def _finite(points: Iterable[tuple[float, ...]]) -> list[tuple[float, ...]]:
    return [point for point in points if all(map(math.isfinite, point))]


def _curves(comparison: Comparison) -> Figure | None:
    """Learning curves: mean over seeds, and the range between them."""
    metrics = [("val/nll", "validation nll (nats)", "log")]
    metrics += [("val/acc", "validation accuracy", "linear")]
    groups = comparison.groups[:MAX_CURVES]
    if len({_function(group) for group in groups}) == 1:
        # Losses that are other functions cannot be compared on one axis.
        metrics.insert(0, ("train/loss", "training loss (nats)", "log"))
    if not any(group.curve(name) for group in groups for name, _, _ in metrics):
        return None
    figure, grid = panels.in_rows(len(metrics), 3, height=3.1)
    looks = panels.styles(group.label for group in groups)
    for axes, (name, ylabel, scale) in zip(grid, metrics, strict=True):
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        curves = {group.label: _finite(group.curve(name)) for group in groups}
        looks = panels.with_widths(looks, curves)
        for label, curve in curves.items():
            if curve:
                steps, means, lows, highs = zip(*curve, strict=True)
                # A single evaluation is a point, which a line does not show.
                marker = "o" if len(steps) == 1 else None
                axes.plot(steps, means, label=label, marker=marker, **looks[label])
                colour = looks[label]["color"]
                axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
        if scale == "log" and any(mean > 0 for curve in curves.values() for _, mean, _, _ in curve):
            axes.set_yscale("log")
    panels.legend_below(figure, grid)
    return figure


def _function(group: Group) -> str:
    """What its loss computes: the same for formulations of one function."""
    settings = group.runs[0].settings
    own = {key: v for key, v in settings.items() if key.startswith("loss.") and v}
    if group.runs[0].loss in settings.get("parity.formulations", ()):
        own.pop("loss.name", None)
    return repr(sorted(own.items()))


def _parity(comparison: Comparison) -> Figure | None:
    """Errors of the formulations against the oracle, the largest of all runs at each step."""
    errors = {
        "ratio": "error over its bound",
        "loss_error": "loss error (nats)",
        "grad_error": "gradient error",
    }
    runs, formulations = comparison.run_set.runs, comparison.ratios
    curves = {
        error: {name: [_largest_by_step(runs, f"parity/{name}/{error}")] for name in formulations}
        for error in errors
    }
    if not any(series for by_name in curves.values() for (series,) in by_name.values()):
        return None
    figure, grid = panels.in_rows(len(errors), 3, height=3.1)
    for axes, (error, label) in zip(grid, errors.items(), strict=True):
        bound = 1.0 if error == "ratio" else None
        looks = panels.with_widths(panels.styles(formulations), curves[error])
        panels.logarithmic(axes, curves[error], looks, bound)
        axes.set(xlabel="optimizer step", ylabel=label)
    panels.legend_below(figure, grid)
    return figure


def _largest_by_step(runs: Iterable[Run], name: str) -> Series:
    return [(step, maximum(values) or 0.0) for step, values in values_by_step(runs, name)]


def _divergence(comparison: Comparison) -> Figure | None:
    """Differences of the training losses within each pair, step by step."""
    by_panel: dict[tuple[str, bool, str], dict[str, list[Series]]] = defaultdict(dict)
    for pair in comparison.pairs:
        if pair.differences:
            curves = by_panel[pair.kind, pair.precision != EXACT, pair.precision]
            if pair.name in curves or len(curves) < MAX_CURVES:
                curves.setdefault(pair.name, []).append(pair.differences)
    if not by_panel:
        return None
    figure, grid = panels.in_rows(len(by_panel), 2, height=3.4)
    looks = panels.styles(dict.fromkeys(name for curves in by_panel.values() for name in curves))
    for axes, (key, curves) in zip(grid, sorted(by_panel.items()), strict=True):
        kind, inexact, precision = key
        here = panels.with_widths(looks, curves)
        panels.logarithmic(axes, curves, here, bound=None if inexact else FLOAT64_BOUND)
        axes.set(xlabel="optimizer step", ylabel="relative difference")
        axes.set_title(plots.label(f"{kind}, {precision}"), fontsize=10)
    panels.legend_below(figure, grid)
    return figure


def _confusion(comparison: Comparison) -> Figure | None:
    """Confusion matrices of the test split side by side, summed over seeds."""
    groups = [group for group in comparison.groups if _tested(group, "confusion")][:MAX_MATRICES]
    if not groups:
        return None
    figure, grid = panels.in_rows(len(groups), 3, height=3.9 if len(groups) > 3 else 3.6)
    for axes, group in zip(grid, groups, strict=True):
        runs = _tested(group, "confusion")
        names = runs[0].evaluation["class_names"]
        # Image folders may have changed between two runs: other classes cannot be added up.
        same = [run for run in runs if run.evaluation["class_names"] == names]
        counts = np.sum([run.evaluation["test"]["confusion"] for run in same], axis=0)  # [K, K]
        part = "" if len(same) == len(runs) else f" ({len(same)} of {len(runs)} runs)"
        axes.set_title(plots.label(group.label + part, 40), fontsize=9)
        plots.confusion(axes, counts.tolist(), [str(name) for name in names])
        axes.set_xlabel("predicted class")
    grid[0].set_ylabel("true class")
    return figure


def _tested(group: Group, name: str) -> list[Run]:
    """Completed runs whose evaluation of the test split has some figure, such as `confusion`."""
    return [run for run in group.completed if run.evaluation.get("test", {}).get(name)]


def _calibration(comparison: Comparison) -> Figure | None:
    """Reliability diagram and its histogram: accuracy and samples by confidence."""
    curves = {}
    for group in comparison.groups:
        runs = _tested(group, "calibration")
        points = _finite(_reliability([run.evaluation["test"]["calibration"] for run in runs]))
        if points:
            curves[group.label] = points
    if not curves:
        return None
    figure, (axes, rows) = panels.in_rows(2, 2, height=3.4)
    shown = dict(list(curves.items())[:MAX_CURVES])
    for label, style in panels.with_widths(panels.styles(shown), shown).items():
        xs, ys, counts = zip(*shown[label], strict=True)
        drawn = {"marker": "o", "markersize": style["linewidth"] + 2, "clip_on": False, **style}
        ends = [_wilson(y, count) for y, count in zip(ys, counts, strict=True)]
        bars = [[y - low for y, (low, _) in zip(ys, ends, strict=True)]]
        bars += [[high - y for y, (_, high) in zip(ys, ends, strict=True)]]
        # No line between bins: of a few samples it would go up and down by chance.
        axes.errorbar(
            xs, ys, yerr=bars, label=label, capsize=2, elinewidth=0.8, **drawn | {"linestyle": ""}
        )
        rows.plot(xs, counts, **drawn)
    axes.plot((0, 1), (0, 1), color="black", linewidth=1, linestyle=":", label="calibrated")
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    rows.set(xlabel="confidence", ylabel="test samples", yscale="log", xlim=(0, 1))
    panels.legend_below(figure, (axes,))
    return figure


def _reliability(runs: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, ...]]:
    """Mean confidence, accuracy and samples of each bin that has any, its runs added up."""
    sums = (
        [sum(values) for values in zip(*(bins[key] for bins in runs), strict=False)]
        for key in ("rows", "confidence", "right")
    )
    return [(c / n, r / n, n) for n, c, r in zip(*sums, strict=True) if n]


def _wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of so many samples; Wilson, JASA 22, 1927.

    >>> [round(end, 2) for end in _wilson(1.0, 4)], [round(end, 3) for end in _wilson(0.5, 1000)]
    ([0.51, 1.0], [0.469, 0.531])
    """
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return min(middle - half, share), max(middle + half, share)


def _time(comparison: Comparison) -> Figure | None:
    """Training time and throughput: mean and standard deviation over seeds."""
    groups = [g for g in comparison.groups if any(map(g.spread, TIMING))][:MAX_CURVES]
    if not groups:
        return None
    figure, grid = panels.in_rows(2, 2, height=0.9 + 0.4 * len(groups))
    labels = ("training time (s)", "throughput (samples/s)")
    for axes, name, label in zip(grid, TIMING, labels, strict=True):
        for place, group in enumerate(groups):
            spread = group.spread(name)
            if spread is not None:
                error = spread.deviation or 0.0
                axes.barh(place, spread.mean, xerr=error, capsize=3, color=panels.COLOURS[5])
        axes.set(xlabel=label, ylim=(len(groups) - 0.5, -0.5))
        labels_of_groups = [plots.label(group.label, 40) for group in groups]
        axes.set_yticks(range(len(groups)), labels_of_groups, fontsize=9)
    grid[1].set_yticklabels([])
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
        max_groups=0,
    ),
    Picture(
        "divergence",
        "Divergence",
        "How far the training losses of runs that should take the same steps are apart, a curve "
        "for each seed, of at most 12 kinds of pairs in a panel; 0 is the same float64.",
        _divergence,
        max_groups=0,
    ),
    Picture(
        "confusion",
        "Confusion matrices",
        "Of the test split, summed over seeds; the colour is the share of the true class.",
        _confusion,
        max_groups=MAX_MATRICES,
    ),
    Picture(
        "calibration",
        "Reliability",
        "Of predictions with about the same confidence on the test split, how many are right, with "
        "the 95 % interval of their number (Wilson).",
        _calibration,
    ),
    Picture("time", "Time and throughput", "Mean and standard deviation over seeds.", _time),
)
