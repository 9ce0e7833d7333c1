"""What each key means, read from the schema itself: `python train.py --help`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from omegaconf import MISSING

from equiloss.config import Config

# Hydra fills in the groups and their choices.
HELP = """\
Train and evaluate an image classifier.

  python train.py loss=focal loss.gamma=1 seed=3             another loss, with its option
  python train.py trainer=ddp_cpu trainer.devices=2          two processes, the same numbers
  python train.py -m loss=softmax_nll,cross_entropy seed=0,1 a sweep; again, it goes on

Groups and their choices, GROUP=CHOICE (`equiloss losses NAME` explains a loss):

$APP_CONFIG_GROUPS
Keys, KEY=VALUE, with the defaults that hold where no chosen file sets another
(+trainer.ARGUMENT=VALUE goes to Lightning's Trainer):

{keys}
`--cfg job` prints the whole configuration, `--hydra-help` the flags of Hydra itself.
"""
WIDTH = 100


def help_text() -> str:
    """The help of `train.py`, as a template of Hydra's."""
    return (
        HELP.format(keys="".join(_lines(Config)))
        .replace("$", "$$")
        .replace("$$APP_CONFIG_GROUPS", "$APP_CONFIG_GROUPS")
    )


def _lines(group: type, prefix: str = "") -> Iterator[str]:
    """A paragraph for each key of a group, and of the groups within it."""
    hints, meanings = get_type_hints(group), meaning(group)
    for field in dataclasses.fields(group):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield "\n"
            yield from _lines(kind, f"{prefix}{field.name}.")
            continue
        key = f"{prefix}{field.name}{_default(field)}"
        text = " ".join(meanings.get(field.name, "").split())
        yield textwrap.fill(f"{key}: {text}", WIDTH, subsequent_indent=" " * 6) + "\n"


def meaning(group: type) -> dict[str, str]:
    """The text below each field of a dataclass.

    >>> meaning(Config)["seed"]
    'Seed of weights, order and augmentation.'
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for entry, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant):
                found[entry.target.id] = str(text.value)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value == MISSING:
        return "=…"
    shown = {None: "null", True: "true", False: "false"}
    return f"={shown[value]}" if value is None or isinstance(value, bool) else f"={value}"
