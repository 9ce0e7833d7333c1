"""What help and configurations need of a loss, as plain data, so that torch need not be imported.

It is read from the loss, as everything about losses is. Of a built-in loss it is kept for the
next command, for as long as no file of this package changes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equiloss.losses import registry
from equiloss.losses.signature import Option, Signature
from equiloss.records.remembered import recall, remember

KIND = "losses"
HERE = Path(__file__).parent

# What an option's annotation may be if it is to be kept, by how it is written.
ANNOTATIONS: dict[str, Any] = {
    str(kind): kind
    for plain in (bool, int, float, str)
    for kind in (plain, plain | None, list[plain])  # type: ignore[valid-type]
} | {str(Any): Any}


@dataclass(frozen=True)
class Description:
    """A loss: its options, its capabilities with their defaults, and its docstring."""

    options: Mapping[str, Option]
    """Every configurable keyword, in the order of the signature."""
    supports: list[str]
    """Which of weight, ignore_index, label_smoothing and class_counts it takes."""
    soft_targets: bool
    shift_invariant: bool
    """With the default options."""
    max_logit_range: dict[str, float] | float | None
    """Largest logsumexp(x) - min(x) it is sound for, by dtype where they differ."""
    reference: str | None
    doc: str | None


def describe(name: str) -> Description:
    """Describe the loss registered under `name`.

    Raises:
        LossError: as `registry.get` does. A plugin's attributes may raise anything.

    >>> describe("focal").options["gamma"]
    Option(annotation=<class 'float'>, default=2.0, choices=())
    """
    if registry.provider(name).source != registry.OURS:
        return _read(name)
    state, known = _state(), recall(KIND, HERE)
    kept = known.get("losses") if known.get("state") == state else None
    losses = kept if isinstance(kept, dict) else {}
    if (found := _from_plain(losses.get(name))) is not None:
        return found
    described = _read(name)
    plain = _as_plain(described)
    if _from_plain(json.loads(json.dumps(plain))) == described:
        remember(KIND, HERE, {"state": state, "losses": {**losses, name: plain}})
    return described


def _read(name: str) -> Description:
    loss, signature = registry.get(name), registry.signature(name)
    return Description(
        options=signature.options,
        supports=sorted(signature.supported),
        soft_targets=signature.soft_targets,
        shift_invariant=signature.is_shift_invariant(),
        max_logit_range=_range(signature),
        reference=signature.reference,
        doc=inspect.getdoc(loss),
    )


def _range(signature: Signature) -> dict[str, float] | float | None:
    limit = signature.max_logit_range
    if not callable(limit):
        return None if limit is None else float(limit)
    import torch

    return {dtype: signature.domain(getattr(torch, dtype)) for dtype in ("float32", "float64")}


def _state() -> list[Any]:
    """What a description depends on: the files that losses and their reader are written in."""
    files = sorted(HERE.rglob("*.py"))
    stamps = [[file.name, *_size_and_time(file)] for file in files]
    return [version("equiloss"), list(sys.version_info[:3]), stamps]


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _as_plain(described: Description) -> dict[str, Any]:
    options = {
        key: [str(option.annotation), option.default, list(option.choices)]
        for key, option in described.options.items()
    }
    return {**vars(described), "options": options}


def _from_plain(plain: Any) -> Description | None:
    """What was kept, or None where it was not, or has another form."""
    fields = {field.name for field in dataclasses.fields(Description)}
    try:
        if plain.keys() != fields:
            return None
        options = {
            str(key): Option(ANNOTATIONS[text], default, tuple(choices))
            for key, (text, default, choices) in plain["options"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return Description(**{**plain, "options": options})
