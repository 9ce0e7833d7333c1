"""Reading of what runs left behind, which may be damaged, another program's, or hostile.

Size, depth and aliases are bounded before anything is made of a file, no link is followed, and
whatever is wrong is one `RecordError`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from equiloss.config.checks import DEPTH, SCALAR, check_plain
from equiloss.errors import RecordError, first_line

_T = TypeVar("_T")
# A matrix of 100 classes takes 0.1 MiB, and weights of 20,000 classes in a configuration 0.3 MiB.
JSON_MIB, YAML_MIB = 4, 1
# Events of YAML, which takes some seconds for so many.
EVENTS = 100_000


def open_no_link(path: str, flags: int) -> int:
    """An opener that follows no symbolic link, and does not wait for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read_bytes(file: Path, most_mib: int) -> bytes:
    """The content of a regular file of at most so many MiB.

    Raises:
        RecordError: if it is missing, larger, a link, or no regular file.
    """
    try:
        with open(file, "rb", opener=open_no_link) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise RecordError(file, "is no regular file")
            content = stream.read((most_mib << 20) + 1)
    except OSError as error:
        raise RecordError(file, reason(error)) from error
    if len(content) > most_mib << 20:
        raise RecordError(file, f"is larger than {most_mib} MiB")
    return content


def reason(error: OSError) -> str:
    """Why a file cannot be opened, as the end of a sentence."""
    known = {errno.ENOENT: "is missing", errno.ELOOP: "is a link, which is not followed"}
    return known.get(error.errno or 0, f"cannot be opened ({error.strerror})")


def read_text(file: Path, most_mib: int) -> str:
    """The content of a text file; raises `RecordError` as `read_bytes` does, or for other bytes."""
    try:
        return read_bytes(file, most_mib).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(file, "is no text in UTF-8") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RecordError: if there is none, or it is of no use; see `parse_json`.
    """
    text = read_text(file, JSON_MIB)
    try:
        return parse_json(text)
    except ValueError as error:
        raise RecordError(file, str(error)) from error


def parse_json(text: str) -> Any:
    """JSON as our own writers leave it: neither deep, nor with numbers that are none.

    Raises:
        ValueError: saying what is wrong, as the end of a sentence.

    >>> parse_json("[1, NaN]")
    Traceback (most recent call last):
    ValueError: is no JSON (NaN)
    """
    try:
        tree = json.loads(text, parse_constant=_no_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"is nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})" if text.strip() else "is empty") from None
    check_plain(tree)
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # untyped
    """Reads like OmegaConf's own loader, many times faster: dates are text, 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as OmegaConf writes it: without aliases, anchors and tags.

    Raises:
        RecordError: if there is none, or it is of no use.
    """
    text = read_text(file, YAML_MIB)
    try:
        _check_events(text)
        tree = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise RecordError(file, f"is no YAML ({problem}{where})") from error
    except ValueError as error:
        raise RecordError(file, str(error)) from error
    if not isinstance(tree, dict):
        raise RecordError(file, "holds no mapping" if text.strip() else "is empty")
    return tree


def _load(text: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except ValueError:
        raise ValueError("has a number that is none") from None
    check_plain(tree)
    return tree


def _check_events(text: str) -> None:
    """Refuse what would take long to build, or much room: a few aliases make a billion items."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > EVENTS:
            raise ValueError(f"has more than {EVENTS} parts")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"is nested deeper than {DEPTH} levels")
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            line = event.start_mark.line + 1
            raise ValueError(f"has an alias, an anchor or a tag in line {line}, as no run writes")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > SCALAR:
            raise ValueError(f"has a value of more than {SCALAR} characters")


def build(kind: type[_T], tree: Any) -> _T:
    """A dataclass from the plain mapping of its fields, each checked for its type.

    Raises:
        ValueError: naming the fields that are of another type, missing or unknown.
    """
    if not isinstance(tree, dict):
        raise ValueError("holds no mapping")  # noqa: TRY004
    hints = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
    odd = [name for name in tree if name not in hints or not fits(tree[name], hints[name])]
    if odd:
        raise ValueError(f"is of another form: {', '.join(odd)}")
    try:
        return kind(**tree)
    except TypeError:
        raise ValueError(f"lacks some of {', '.join(hints)}") from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type, or a mapping with keys of some types; True is no number.

    >>> fits({"a": [1, 2.5]}, {"a": list[float]}), fits(True, int), fits(None, int | None)
    (True, False, True)
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], inner) for key, inner in kind.items()
        )
    outer, inner = get_origin(kind), get_args(kind)
    if outer is UnionType:
        return any(fits(value, each) for each in inner)
    if outer in (dict, list):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, outer) and all(fits(item, inner[-1]) for item in items)
    if isinstance(value, bool):
        return kind in (bool, Any)
    return kind is Any or isinstance(value, int | float if kind is float else kind)
