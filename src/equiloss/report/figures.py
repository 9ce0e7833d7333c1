"""The report's pictures. None is drawn of what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equiloss.report.compare import FLOAT64_BOUND, Comparison, Group
from equiloss.report.pairs import Pair
from equiloss.report.runs import Series

# Okabe & Ito, "Color universal design", 2008: told apart by the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
# Curves beyond this number hide each other; the table has them all.
MOST = 12
# Where a logarithmic axis shows "the same bits".
FLOOR = 1e-17


def draw_all(comparison: Comparison, directory: Path) -> dict[str, str]:
    """Draw every picture that there are figures for; returns file name and caption of each."""
    drawn = {}
    for name, caption, draw in PICTURES:
        figure = draw(comparison)
        if figure is not None:
            figure.savefig(directory / f"{name}.png", dpi=110, metadata={"Software": None})
            drawn[f"{name}.png"] = caption
    return drawn


def _styles(labels: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, label in enumerate(labels):
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        # Curves that should be the same lie on each other: the later ones are thinner.
        width = max(3.6 - 1.2 * number, 1.0)
        colour = COLOURS[number % len(COLOURS)]
        yield label, {"color": colour, "linestyle": dash, "linewidth": width}


def _panels(count: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.3 * max(count, 1), height), layout="constrained")
    return figure, [figure.add_subplot(1, count, number + 1) for number in range(count)]


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)


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
    figure, places = _panels(len(panels))
    for axes, (name, label, scale) in zip(places, panels, strict=True):
        for group, (_, style) in zip(groups, _styles([g.label for g in groups]), strict=True):
            curve = group.curve(name)
            if curve:
                steps, means, lows, highs = zip(*curve, strict=True)
                axes.plot(steps, means, label=group.label, **style)
                axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="optimizer step", ylabel=label, yscale=scale)
    _legend_below(figure, places[0])
    return figure


def _parity(comparison: Comparison) -> Figure | None:
    """Errors of the formulations against the oracle, the largest of all runs at each step."""
    names = list(comparison.ratios)
    if not names:
        return None
    panels = (
        ("ratio", "error over its bound"),
        ("loss_error", "loss error (nats)"),
        ("grad_error", "gradient error (mass × d loss / d logits)"),
    )
    figure, places = _panels(len(panels))
    for axes, (key, label) in zip(places, panels, strict=True):
        for name, style in _styles(names):
            worst: dict[int, float] = {}
            for run in comparison.completed:
                for step, value in run.metrics.get(f"parity/{name}/{key}", []):
                    worst[step] = max(worst.get(step, FLOOR), value)
            steps = sorted(worst)
            heights = [worst[step] for step in steps]
            axes.plot(steps, heights, label=name, marker=".", **style)
        if key == "ratio":
            axes.axhline(1, color="black", linewidth=1, linestyle=":", label="bound")
        axes.set(xlabel="optimizer step", ylabel=label, yscale="log")
    _legend_below(figure, places[0])
    return figure


def _divergence(comparison: Comparison) -> Figure | None:
    """How far runs of one function are apart, step by step."""
    kinds = (
        ("formulations", True, "formulations, float64"),
        ("formulations", False, "formulations, lower precision"),
        ("world sizes", True, "world sizes, float64"),
        ("world sizes", False, "world sizes, lower precision"),
    )
    chosen: list[tuple[str, bool, list[Pair]]] = []
    for kind, exact, title in kinds:
        pairs = [
            pair
            for pair in comparison.pairs
            if pair.kind == kind and (pair.precision == "64-true") == exact and pair.apart
        ]
        if pairs:
            chosen.append((title, exact, pairs[:MOST]))
    if not chosen:
        return None
    figure, places = _panels(len(chosen), height=4.4)
    for axes, (title, exact, pairs) in zip(places, chosen, strict=True):
        for pair, (label, style) in zip(pairs, _styles([p.label for p in pairs]), strict=True):
            axes.plot(*_floored(pair.apart), label=label, **style)
        if exact:
            axes.axhline(FLOAT64_BOUND, color="black", linewidth=1, linestyle=":", label="bound")
        axes.set(
            xlabel="optimizer step",
            ylabel="training loss: relative difference",
            yscale="log",
            ylim=(FLOOR / 3, None),
            title=title,
        )
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=7)
        powers = [power for power in range(-16, 1, 2) if 10.0**power <= axes.get_ylim()[1]]
        labels = ["0", *(f"$10^{{{power}}}$" for power in powers)]
        axes.set_yticks([FLOOR, *(10.0**power for power in powers)], labels)
    return figure


def _floored(series: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [max(value, FLOOR) for _, value in series]


def _tests(group: Group) -> list[dict[str, Any]]:
    """Evaluations of the test split over the same classes as the group's first one."""
    found = [run.evaluation for run in group.runs if "test" in run.evaluation]
    return [one for one in found if one["class_names"] == found[0]["class_names"]]


def _confusion(comparison: Comparison) -> Figure | None:
    """Confusion matrices of the test split side by side, summed over seeds."""
    # Of more than 100 classes no matrix is kept.
    groups = [
        group
        for group in comparison.groups
        if any(found["test"]["confusion"] for found in _tests(group))
    ][:6]
    if not groups:
        return None
    figure, places = _panels(len(groups), height=4.2)
    for axes, group in zip(places, groups, strict=True):
        matrices = [found["test"]["confusion"] for found in _tests(group)]
        names = _tests(group)[0]["class_names"]
        classes = range(len(names))
        counts = [[sum(m[row][column] for m in matrices) for column in classes] for row in classes]
        share = [[value / max(sum(row), 1) for value in row] for row in counts]
        axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(group.label, fontsize=9)
        if len(names) <= 20:
            axes.set_xticks(classes, names, rotation=90, fontsize=7)
            axes.set_yticks(classes, names, fontsize=7)
            for row in classes:
                for column in classes:
                    if counts[row][column]:
                        axes.text(
                            column,
                            row,
                            str(counts[row][column]),
                            ha="center",
                            va="center",
                            fontsize=6,
                            # The colour map is dark below one half.
                            color="white" if share[row][column] < 0.5 else "black",
                        )
    return figure


def _calibration(comparison: Comparison) -> Figure | None:
    """Reliability: how often a prediction of some confidence is right."""
    figure, (axes, rows) = _panels(2)
    groups = [group for group in comparison.groups if _tests(group)][:MOST]
    for group, (label, style) in zip(groups, _styles([g.label for g in groups]), strict=True):
        bins = [found["test"]["calibration"] for found in _tests(group)]
        total, confidence, right = (
            [sum(values) for values in zip(*(found[key] for found in bins), strict=True)]
            for key in ("rows", "confidence", "right")
        )
        points = [(c / n, r / n, n) for n, c, r in zip(total, confidence, right, strict=True) if n]
        if not points:
            continue  # every row of the split was ignored
        xs, ys, counts = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, label=label, **style)
        rows.plot(xs, counts, marker="o", markersize=4, **style)
    if not groups:
        return None
    axes.plot((0, 1), (0, 1), color="black", linewidth=1, linestyle=":", label="calibrated")
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    rows.set(xlabel="confidence", ylabel="test samples", yscale="log", xlim=(0, 1))
    _legend_below(figure, axes)
    return figure


def _time(comparison: Comparison) -> Figure | None:
    """Training time and throughput."""
    groups = [group for group in comparison.groups if group.spread("train_s")][:MOST]
    if not groups:
        return None
    figure, places = _panels(2, height=1.2 + 0.35 * len(groups))
    labels = (("train_s", "training time (s)"), ("samples_per_s", "throughput (samples/s)"))
    for axes, (name, label) in zip(places, labels, strict=True):
        bars = {group.label: spread for group in groups if (spread := group.spread(name))}
        axes.barh(
            range(len(bars)),
            [spread.mean for spread in bars.values()],
            xerr=[spread.deviation or 0 for spread in bars.values()],
            color=COLOURS[0],
        )
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.set(xlabel=label)
        axes.invert_yaxis()
    return figure


Draw = Callable[[Comparison], "Figure | None"]
PICTURES: tuple[tuple[str, str, Draw], ...] = (
    ("curves", "Learning curves: mean over seeds, and their range.", _curves),
    ("parity", "Errors against the oracle at each parity step, the largest of all runs.", _parity),
    ("divergence", "How far runs that should take the same steps are apart.", _divergence),
    ("confusion", "Confusion matrices of the test split, summed over seeds.", _confusion),
    ("calibration", "Reliability on the test split.", _calibration),
    ("time", "Time and throughput: mean and standard deviation.", _time),
)
