"""Things named by import path: `package.module:attribute`."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equiloss.errors import UserError


@contextmanager
def foreign_code() -> Iterator[None]:
    """Turn what ends a process, such as `sys.exit`, into an `Exception` while the context lasts.

    Ctrl-C still ends it.

    >>> with foreign_code():
    ...     raise SystemExit(3)
    Traceback (most recent call last):
    RuntimeError: it would end the process (SystemExit: 3)
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"it would end the process ({type(error).__name__}: {error})") from error


def import_from_here() -> None:
    """Have modules in the current directory found before others, as `python train.py` does."""
    sys.path.insert(0, str(Path.cwd()))


def import_torchmetrics() -> None:
    """Import torchmetrics, as Lightning does, without `scipy.signal`, which takes a second.

    Where SciPy is installed torchmetrics looks there for one name, to mend it for a metric of
    speech. It gets an empty module that has it; whoever imports `scipy.signal` gets the real one.
    """
    name = "scipy.signal"
    if name in sys.modules or "torchmetrics" in sys.modules:
        return
    sys.modules[name] = stand_in = types.ModuleType(name)
    stand_in.hamming = None  # type: ignore[attr-defined]
    try:
        importlib.import_module("torchmetrics")
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def import_target(target: str, key: str, error: type[UserError]) -> Callable[..., Any]:
    """Import a function or class.

    Args:
        target: `package.module:attribute`.
        key: The configuration key that named it, for the message.
        error: What to raise.

    Raises:
        UserError: of the given type, if the path has another form, leads to nothing callable, or
            its module cannot be imported, whatever the reason.

    >>> import_target("math:sqrt", "loss.target", UserError)(4.0)
    2.0
    >>> import_target("math.sqrt", "loss.target", UserError)
    Traceback (most recent call last):
    equiloss.errors.UserError: loss.target must read package.module:function, got 'math.sqrt'
    """
    module, separator, attribute = target.partition(":")
    if not (separator and module and attribute):
        raise error(f"{key} must read package.module:function, got {target!r}")
    try:
        with foreign_code():
            imported: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as cause:  # a module may fail in any way
        kind = "" if isinstance(cause, (ImportError, AttributeError)) else type(cause).__name__
        why = f"{kind}: {cause}" if kind else str(cause)
        raise error(f"{key}={target} cannot be imported: {why}") from cause
    if not callable(imported):
        raise error(f"{key}={target} is a {type(imported).__name__}, not a function or class")
    return imported
