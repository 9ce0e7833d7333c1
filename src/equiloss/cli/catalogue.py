"""Registered losses, as `equiloss losses` shows them: a table of all losses, a page on one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from equiloss.cli import braille
from equiloss.errors import UserError
from equiloss.losses import registry
from equiloss.losses.description import describe
from equiloss.losses.signature import Option

# Of the true class's probability, for two curves side by side in 80 columns of text.
CURVE_POINTS = 56


@dataclass(frozen=True)
class Entry:
    """A registered loss: its source, options, capabilities and docstring."""

    name: str
    source: str = ""
    """Distribution and version, or the module that registered it."""
    error: str | None = None
    """Why it cannot be used; nothing more is known then."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every option with its default; `???` where it is required."""
    types: dict[str, str] = field(default_factory=dict)
    """Every option with the type that its values have in a configuration."""
    supports: list[str] = field(default_factory=list)
    """Which of weight, ignore_index, label_smoothing and class_counts it takes."""
    soft_targets: bool = False
    shift_invariant: bool = True
    """With the default options."""
    max_logit_range: dict[str, float] | float | None = None
    """Largest logsumexp(x) - min(x) it is sound for, by dtype where they differ."""
    reference: str | None = None
    formula: str | None = None
    """The first indented paragraph of its docstring."""
    doc: str | None = None

    def summary(self) -> dict[str, Any]:
        """The loss's row of the table, as plain data."""
        if self.error is not None:
            return {"name": self.name, "source": self.source, "error": self.error}
        left_out = ("error", "types", "formula", "doc")
        return {key: value for key, value in vars(self).items() if key not in left_out}


def read_entry(name: str) -> Entry:
    """Describe one registered loss; one that cannot be used has its error in the entry.

    Raises:
        LossError: if the name is unknown.
    """
    if name not in registry.names():
        registry.provider(name)  # raises, with the near miss
    source = ""
    try:
        source = registry.provider(name).source
        return _usable_entry(name, source)
    except Exception as error:  # a plugin may fail in any way, and breaks no other
        message = str(error) if isinstance(error, UserError) else _with_type(error)
        return Entry(name, source, message)


def measure(name: str) -> dict[str, list[float]]:
    """Evaluate a loss with its default options on the logits (m/2, -m/2), m = log(p / (1 - p)).

    Class counts, where it wants them, are equal. Raises whatever the loss raises.

    Returns:
        `loss` and `gradient` (d loss / d x_y, x_y being the true class's logit) by the true
        class's probability `p`.
    """
    import torch

    from equiloss.losses.criterion import Criterion

    criterion = Criterion(name, class_counts=[1, 1])
    p = (torch.arange(CURVE_POINTS, dtype=torch.float64) + 0.5) / CURVE_POINTS
    margin = p.logit()
    logits = torch.stack([margin / 2, -margin / 2], dim=-1).requires_grad_()  # [points, 2]
    losses = criterion.per_sample(logits, torch.zeros(CURVE_POINTS, dtype=torch.int64))
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    return {"p": p.tolist(), "loss": losses.tolist(), "gradient": slope[:, 0].tolist()}


def table(entries: Sequence[Entry]) -> Table:
    """All losses, nothing left out: what is too wide for the terminal goes on in the next line."""
    losses = _folding_table("loss, source, reference", "options", "capabilities", show_lines=True)
    for entry in entries:
        about = Text.assemble((entry.name, "bold"), "\n", (entry.source, "dim"))
        for line in (entry.error, entry.reference):
            about.append(f"\n{line}" if line else "", style="red" if entry.error else "dim")
        options = (f"{key}={_default_text(value)}" for key, value in entry.options.items())
        losses.add_row(about, Text("\n".join(options)), Text("\n".join(_capabilities(entry))))
    return losses


def page(entry: Entry) -> dict[str, Any]:
    """Everything that is known of a usable loss, its curve included, as plain data."""
    known = entry.summary() | {"types": entry.types, "formula": entry.formula, "doc": entry.doc}
    try:
        curve = measure(entry.name).items()
    except Exception as error:  # a plugin may fail in any way, and the rest of its page stands
        return known | {"curve": None, "no_curve": _with_type(error)}
    # JSON knows no infinity and no NaN.
    finite = {key: [v if math.isfinite(v) else None for v in values] for key, values in curve}
    return known | {"curve": finite}


def show_page(entry: Entry, console: Console) -> None:
    """Print a usable loss: its docstring with the formula, its options, and a plot."""
    console.print(Text.assemble((entry.name, "bold"), "  ", (entry.source, "dim")))
    if entry.doc:
        console.print(_readable(entry.doc, entry.formula))
    console.print(Text())
    if entry.options:
        options = _folding_table("option", "type", "default", title="options", title_justify="left")
        for key, value in entry.options.items():
            options.add_row(Text(f"loss.{key}"), Text(entry.types[key]), Text(_default_text(value)))
        console.print(options)
    capabilities = ", ".join(_capabilities(entry)) or "none beside its options"
    console.print(Text(f"capabilities: {capabilities}"))
    if entry.reference:
        console.print(Text(f"reference: {entry.reference}"))
    for line in _plot(entry.name):
        console.print(line)


def _folding_table(*titles: str, **options: Any) -> Table:
    return Table(*(Column(title, overflow="fold") for title in titles), **options)


def _plot(name: str) -> list[Text]:
    try:
        curve = measure(name)
    except Exception as error:  # a plugin may fail in any way, and the rest of its page stands
        return [Text(f"\nno plot: {_with_type(error)}")]
    loss = braille.curve("loss", curve["loss"])
    gradient = braille.curve("gradient, d loss / d x_y", curve["gradient"])
    width = max(map(len, loss))
    pairs = [f"{left:<{width}}  {right}" for left, right in zip(loss, gradient, strict=True)]
    axis = " " * (braille.LABEL + 2) + "0" + f"{'p_y':^{CURVE_POINTS // 2 - 2}}" + "1"
    note = "Two classes, default options; p_y is the softmax probability of the true one."
    return [Text(line, no_wrap=True) for line in ("", *pairs, f"{axis}  {axis}")] + [Text(note)]


def _capabilities(entry: Entry) -> list[str]:
    capabilities = ["soft targets"] if entry.soft_targets else []
    capabilities += ["class counts"] if "class_counts" in entry.supports else []
    capabilities += [] if entry.shift_invariant else ["not shift invariant"]
    limit = entry.max_logit_range
    if isinstance(limit, dict):
        capabilities += [f"range {value:.4g} ({dtype})" for dtype, value in limit.items()]
    elif limit is not None:
        capabilities.append(f"range {limit:.4g}")
    return capabilities


def _readable(doc: str, formula: str | None) -> Text:
    """A docstring whose prose is as wide as the terminal, and whose formula stands out."""
    paragraphs = [
        paragraph if "\n " in f"\n{paragraph}" else " ".join(paragraph.splitlines())
        for paragraph in doc.split("\n\n")
    ]
    text = Text("\n\n".join(paragraphs))
    for line in (formula or "").splitlines():
        text.highlight_words([line.strip()], "bold")
    return text


def _formula(doc: str | None) -> str | None:
    """The first indented paragraph of a docstring."""
    for paragraph in (doc or "").split("\n\n"):
        if paragraph and all(line.startswith("    ") for line in paragraph.splitlines()):
            return inspect.cleandoc(paragraph)
    return None


def _usable_entry(name: str, source: str) -> Entry:
    known = describe(name)
    options = known.options.items()
    return Entry(
        name,
        f"equiloss {version('equiloss')}" if source == registry.OURS else source,
        options={key: option.default for key, option in options},
        types={key: _type(option) for key, option in options},
        supports=known.supports,
        soft_targets=known.soft_targets,
        shift_invariant=known.shift_invariant,
        max_logit_range=known.max_logit_range,
        reference=known.reference,
        formula=_formula(known.doc),
        doc=known.doc,
    )


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _default_text(default: Any) -> str:
    """A default as it is written on the command line.

    >>> [_default_text(value) for value in (None, True, 0.5, "sum", "???")]
    ['null', 'true', '0.5', 'sum', '(required)']
    """
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "(required)" if default == "???" else str(default)


def _type(option: Option) -> str:
    """What an option may be.

    >>> _type(Option(str, "a", ("a", "b", None))), _type(Option(float, 1.0)), _type(Option(Any, 1))
    ('a | b | null', 'float', 'any')
    """
    if option.choices:
        return " | ".join(map(_default_text, option.choices))
    kind = option.annotation
    if kind is Any:
        return "any"
    return kind.__name__ if type(kind) is type else str(kind)
