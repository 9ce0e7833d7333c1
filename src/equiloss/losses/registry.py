"""Names of losses: the built-in ones, those of installed plugins, and those of imported code.

Names are known without importing anything; only the chosen loss is imported. Nothing is ever
overwritten: where two sides claim one name, choosing it is an error that names both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, TypeVar, overload

from equiloss.errors import LossError, unknown
from equiloss.imports import foreign_code, import_target
from equiloss.losses.adapter import adapted
from equiloss.losses.signature import LossFunction, Signature, read

GROUP = "equiloss.losses"

# The name in a configuration of a loss that is given by its import path.
CUSTOM = "custom"

# The source of built-in losses.
OURS = "equiloss"

# Names that mean something else, in a configuration or after `equiloss verify`.
KEPT = {
    CUSTOM: "losses by import path",
    "invariance": "`equiloss verify invariance`",
    "losses": "`equiloss verify losses`",
}

_BUILT_IN = {
    "balanced_softmax": "equiloss.losses.shelf.long_tail:balanced_softmax",
    "bi_tempered": "equiloss.losses.shelf.bi_tempered:bi_tempered",
    "cross_entropy": "equiloss.losses.formulations:cross_entropy",
    "focal": "equiloss.losses.shelf.focal:focal",
    "generalized_cross_entropy": "equiloss.losses.shelf.robust:generalized_cross_entropy",
    "ldam": "equiloss.losses.shelf.long_tail:ldam",
    "linear_cross_entropy": "equiloss.losses.shelf.linear:linear_cross_entropy",
    "log_softmax_nll": "equiloss.losses.formulations:log_softmax_nll",
    "logit_adjusted": "equiloss.losses.shelf.long_tail:logit_adjusted",
    "poly1": "equiloss.losses.shelf.focal:poly1",
    "sigmoid_bce": "equiloss.losses.shelf.binary:sigmoid_bce",
    "softmax_nll": "equiloss.losses.formulations:softmax_nll",
    "symmetric_cross_entropy": "equiloss.losses.shelf.robust:symmetric_cross_entropy",
}

_F = TypeVar("_F", bound=LossFunction)


@dataclass(frozen=True)
class Provider:
    """One claim on a name."""

    name: str
    source: str
    """Who makes the claim: `equiloss`, a distribution with its version, or a module."""
    load: Callable[[], LossFunction]


_registered: dict[str, Provider] = {}


def names() -> list[str]:
    """Every registered name, sorted; imports no loss.

    >>> {"cross_entropy", "log_softmax_nll", "softmax_nll"} <= set(names())
    True
    """
    return sorted({provider.name for provider in _providers()})


def get(name: str) -> LossFunction:
    """The per-sample function registered under `name`: (logits [N, C], target) -> [N].

    Raises:
        LossError: if the name is unknown (the message has the near miss), claimed twice, or its
            plugin cannot be imported.

    >>> get("cross_entropy").__name__
    'cross_entropy'
    """
    return provider(name).load()


def signature(name: str) -> Signature:
    """Capabilities and options of the loss registered under `name`; raises as `get` does."""
    return read(name, get(name))


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """A loss as a configuration stores it, completed with the defaults that its options have today.

    It is left as it is where no such loss is registered, or it cannot be imported.

    >>> with_defaults({"name": "focal"})
    {'gamma': 2.0, 'weight': None, 'ignore_index': -100, 'name': 'focal'}
    """
    try:
        known = signature(str(options["name"])).options
    except LossError:
        return dict(options)
    return {key: option.default for key, option in known.items()} | dict(options)


def provider(name: str) -> Provider:
    """Who provides `name`; raises `LossError` if nobody does, or more than one."""
    claims = [claim for claim in _providers() if claim.name == name]
    if not claims:
        raise LossError(unknown("loss", name, names()))
    if len(claims) > 1:
        sides = " and ".join(claim.source for claim in claims)
        raise LossError(f"loss name {name!r} is claimed by {sides}: rename one of them")
    return claims[0]


@overload
def register(loss: _F, *, name: str | None = None) -> _F: ...
@overload
def register(loss: None = None, *, name: str | None = None) -> Callable[[_F], _F]: ...
def register(loss: _F | None = None, *, name: str | None = None) -> _F | Callable[[_F], _F]:
    """Register a loss of imported code, as a decorator with or without a name.

    Raises:
        LossError: if the name is taken, naming both sides, or the signature is not a loss's.

    >>> @register(name="hinge_for_docs")
    ... def hinge(logits, target, *, margin: float = 1.0): ...
    >>> get("hinge_for_docs") is hinge
    True
    >>> unregister("hinge_for_docs")
    """
    if loss is None:
        return lambda function: register(function, name=name)
    key = name or loss.__name__
    source = f"{loss.__module__}:{loss.__qualname__}"
    if key in KEPT:
        raise LossError(
            f"cannot register {source} as loss {key!r}: that name is kept for {KEPT[key]}"
        )
    for claim in _providers():
        if claim.name == key:
            raise LossError(
                f"cannot register {source} as loss {key!r}: {claim.source} provides that name"
            )
    ours = adapted(key, loss)
    read(key, ours)
    _registered[key] = Provider(key, source, lambda: ours)
    return loss


def unregister(name: str) -> None:
    """Take back a `register`; raises `LossError` for a name that no imported code registered."""
    if _registered.pop(name, None) is None:
        raise LossError(unknown("registered loss", name, _registered))


def _providers() -> Iterator[Provider]:
    for name, target in _BUILT_IN.items():
        yield Provider(name, OURS, partial(import_target, target, "loss", LossError))
    yield from _registered.values()
    if os.environ.get("EQUILOSS_DISABLE_PLUGINS") != "1":
        for entry_point in _entry_points(*_search_path()):
            yield _plugin(entry_point)


@lru_cache(maxsize=1)
def _entry_points(*_: tuple[str, int]) -> EntryPoints:
    """Those of the group; reading all distributions' takes 10 ms, and is asked for by the dozen."""
    return entry_points(group=GROUP)


def _search_path() -> Iterator[tuple[str, int]]:
    """Where distributions are installed, and when that changed: a notebook may install one."""
    for directory in sys.path:
        with suppress(OSError):
            yield directory, os.stat(directory).st_mtime_ns  # noqa: PTH116  # "" is the working one


def _plugin(entry_point: EntryPoint) -> Provider:
    distribution = entry_point.dist
    source = f"{distribution.name} {distribution.version}" if distribution else "a plugin"

    def load() -> LossFunction:
        if entry_point.name in KEPT:
            raise LossError(
                f"loss {entry_point.name!r} of {source}: that name is kept for "
                f"{KEPT[entry_point.name]}"
            )
        try:
            with foreign_code():
                loss: LossFunction = entry_point.load()
        except Exception as error:  # a plugin may fail in any way; it is named and breaks no other
            raise LossError(
                f"loss {entry_point.name!r} of {source} ({entry_point.value}) cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error
        if not callable(loss):
            raise LossError(
                f"loss {entry_point.name!r} of {source} ({entry_point.value}) is a "
                f"{type(loss).__name__}, not a function or class"
            )
        try:
            with foreign_code():
                loss = adapted(entry_point.name, loss)
                read(entry_point.name, loss)
        except LossError as error:
            raise LossError(f"{source}: {error}") from error
        except Exception as error:  # whatever its attributes do when they are read
            raise LossError(
                f"{source}: loss {entry_point.name!r} cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error
        return loss

    return Provider(entry_point.name, source, load)
