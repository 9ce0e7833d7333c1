"""What is registered, as `equiloss losses` shows it: a table of all losses, a page on one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from equiloss.cli import braille
from equiloss.errors import UserError
from equiloss.losses import registry
from equiloss.losses.signature import Signature

# Of the true class's probability, for two curves side by side in 80 columns of text.
CURVE_POINTS = 56


@dataclass(frozen=True)
class Entry:
    """What is known of one registered loss."""

    name: str
    source: str = ""
    """Distribution and version, or the module that registered it."""
    error: str | None = None
    """Why nothing more is known."""
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

    def listed(self) -> dict[str, Any]:
        """The row of the table, as plain data."""
        if self.error is not None:
            return {"name": self.name, "source": self.source, "error": self.error}
        left_out = ("error", "types", "formula", "doc")
        return {key: value for key, value in vars(self).items() if key not in left_out}


@dataclass(frozen=True)
class Curve:
    """Loss and gradient of two classes against the true class's probability."""

    p: list[float]
    loss: list[float]
    gradient: list[float]
    """d loss / d x_y, x_y being the true class's logit."""


def entries() -> list[Entry]:
    """Every registered loss; one that cannot be imported is named and breaks no other."""
    return [entry(name) for name in registry.names()]


def entry(name: str) -> Entry:
    """One registered loss.

    Raises:
        LossError: if the name is unknown. A loss that cannot be used has its error in the entry.
    """
    if name not in registry.names():
        registry.provider(name)
    source = ""
    try:
        source = registry.provider(name).source
        return _described(name, source)
    except Exception as error:  # a plugin may fail in any way, and breaks no other
        told = str(error) if isinstance(error, UserError) else _told(error)
        return Entry(name, source, told)


def measure(name: str, points: int = CURVE_POINTS) -> Curve:
    """Evaluate a loss with its default options on the logits (m/2, -m/2), m = log(p / (1 - p)).

    Class counts, where it wants them, are equal. Raises whatever the loss raises.
    """
    import torch

    from equiloss.losses.criterion import Criterion

    criterion = Criterion(name, class_counts=[1, 1])
    p = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    margin = p.logit()
    logits = torch.stack([margin / 2, -margin / 2], dim=-1).requires_grad_()  # [points, 2]
    losses = criterion.per_sample(logits, torch.zeros(points, dtype=torch.int64))
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    return Curve(p.tolist(), losses.tolist(), slope[:, 0].tolist())


def table(found: Sequence[Entry]) -> Table:
    """All losses, nothing left out: what is too wide for the terminal goes on in the next line."""
    shown = Table(show_lines=True)
    for title in ("loss, source, reference", "options", "capabilities"):
        shown.add_column(title, overflow="fold")
    for one in found:
        about = Text.assemble((one.name, "bold"), "\n", (one.source, "dim"))
        for line in (one.error, one.reference):
            about.append(f"\n{line}" if line else "", style="red" if one.error else "dim")
        options = (f"{key}={_shown(value)}" for key, value in one.options.items())
        shown.add_row(about, Text("\n".join(options)), Text("\n".join(_capabilities(one))))
    return shown


def page(one: Entry) -> dict[str, Any]:
    """Everything that is known of one loss, its curve included, as plain data."""
    if one.error is not None:
        return one.listed()
    told = one.listed() | {"types": one.types, "formula": one.formula, "doc": one.doc}
    try:
        curve = vars(measure(one.name)).items()
        # JSON knows no infinity and no NaN.
        finite = {key: [v if math.isfinite(v) else None for v in values] for key, values in curve}
        return told | {"curve": finite}
    except Exception as error:  # a plugin may fail in any way, and the rest of its page stands
        return told | {"curve": None, "no_curve": _told(error)}


def show_page(one: Entry, console: Console) -> None:
    """One loss: its docstring with the formula, its options, and a plot."""
    console.print(Text.assemble((one.name, "bold"), "  ", (one.source, "dim")))
    if one.doc:
        console.print(_readable(one.doc, one.formula))
    for line in _facts(one):
        console.print(line)
    for line in _plot(one.name):
        console.print(line)


def _facts(one: Entry) -> list[RenderableType]:
    options = Table("option", "type", "default", title="options", title_justify="left")
    for column in options.columns:
        column.overflow = "fold"
    for key, value in one.options.items():
        options.add_row(Text(f"loss.{key}"), Text(one.types[key]), Text(_shown(value)))
    facts = [Text(f"capabilities: {', '.join(_capabilities(one)) or 'none beside its options'}")]
    if one.reference:
        facts.append(Text(f"reference: {one.reference}"))
    return [Text(), *([options] if one.options else []), *facts]


def _plot(name: str) -> list[Text]:
    try:
        found = measure(name)
    except Exception as error:  # a plugin may fail in any way, and the rest of its page stands
        return [Text(f"\nno plot: {_told(error)}")]
    panels = (
        braille.curve("loss", found.loss),
        braille.curve("gradient, d loss / d x_y", found.gradient),
    )
    width = max(map(len, panels[0]))
    pairs = [f"{left:<{width}}  {right}" for left, right in zip(*panels, strict=True)]
    axis = " " * (braille.LABEL + 2) + "0" + f"{'p_y':^{CURVE_POINTS // 2 - 2}}" + "1"
    note = "Two classes, default options; p_y is the softmax probability of the true one."
    return [Text(line, no_wrap=True) for line in ("", *pairs, f"{axis}  {axis}")] + [Text(note)]


def _capabilities(one: Entry) -> list[str]:
    told = ["soft targets"] if one.soft_targets else []
    told += ["class counts"] if "class_counts" in one.supports else []
    told += [] if one.shift_invariant else ["not shift invariant"]
    limit = one.max_logit_range
    if isinstance(limit, dict):
        told += [f"range {value:.4g} ({dtype})" for dtype, value in limit.items()]
    elif limit is not None:
        told.append(f"range {limit:.4g}")
    return told


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
    for paragraph in (doc or "").split("\n\n"):
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            return inspect.cleandoc(paragraph)
    return None


def _described(name: str, source: str) -> Entry:
    loss, signature = registry.get(name), registry.signature(name)
    doc = inspect.getdoc(loss)
    return Entry(
        name,
        f"equiloss {version('equiloss')}" if source == "equiloss" else source,
        options={key: option.default for key, option in signature.options.items()},
        types={key: _type(option.annotation) for key, option in signature.options.items()},
        supports=sorted(signature.supported),
        soft_targets=signature.soft_targets,
        shift_invariant=signature.is_shift_invariant(),
        max_logit_range=_range(signature),
        reference=signature.reference,
        formula=_formula(doc),
        doc=doc,
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _range(signature: Signature) -> dict[str, float] | float | None:
    limit = signature.max_logit_range
    if not callable(limit):
        return None if limit is None else float(limit)
    import torch

    dtypes = (torch.float32, torch.float64)
    return {str(d).removeprefix("torch."): signature.domain(d) for d in dtypes}


def _shown(default: Any) -> str:
    """A default as it is written on the command line.

    >>> [_shown(value) for value in (None, True, 0.5, "sum", "???")]
    ['null', 'true', '0.5', 'sum', '(required)']
    """
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "(required)" if default == "???" else str(default)


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
