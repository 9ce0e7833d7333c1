"""Errors of every kind in one line."""

from __future__ import annotations

import os
import re
import shlex
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from equiloss.config import REFUSED_TRAINER_ARGUMENTS
from equiloss.errors import ConfigError, UserError, brief, first_line, unknown
from equiloss.records.writing import ELSEWHERE, refusal

# The parser of overrides begins its messages with one, and a resolver that fails is named by it.
EXCEPTION_NAME = re.compile(
    r"\b\w*(Error|Exception|Warning)( raised while resolving interpolation)?: ?"
)

PACKAGE = os.path.join(Path(__file__).parents[1], "")  # noqa: PTH118  # with a separator at its end

NO_MEMORY = re.compile("can't allocate memory|out of memory|Storage size calculation overflowed")


def check_words(words: Sequence[str]) -> None:
    """Refuse what Hydra would end at with a traceback, or take for something else.

    Raises:
        ConfigError: naming the word of the command line.
    """
    given = dict(word.split("=", 1) for word in words if word.startswith(("loss=", "loss.name=")))
    name = given.get("loss.name", "cross_entropy")
    if "loss" not in given and name != "cross_entropy":
        raise ConfigError(f"loss.name={name} would keep the options of another: give loss={name}")
    for word in words:
        if re.search(r"[\d_]{4300}", word):
            raise ConfigError(f"{word[:100]}… has a number of more than 4300 digits: shorten it")


def explain(error: BaseException, *, of_a_run: bool = True) -> str:
    """One line that names the culprit, the rule and the choices, whatever the user's values hold.

    Args:
        error: What was raised.
        of_a_run: Whether by a run, whose keys are then the way out.

    >>> explain(UserError("seed must lie in [0, 2**32), got -1"))
    'seed must lie in [0, 2**32), got -1'
    """
    return brief(_explained(error, of_a_run))


def _explained(error: BaseException, of_a_run: bool) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group or "config", name, error.options or [])
    if of_composition(error):
        return _explain_composition(error)
    if _no_memory(error):
        parts = "data, network, batch and trainer.micro_batch_size" if of_a_run else "what is read"
        return f"out of memory: {parts} must fit ({first_line(error)})"
    # The logging module makes a ValueError of a log file that cannot be opened.
    for refused in (error, error.__cause__):
        if isinstance(refused, OSError) and refused.errno is not None:
            return refusal(refused, elsewhere=ELSEWHERE if of_a_run else "name another")
    return f"{type(error).__name__}: {error}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where code of the user's raised it, or called what did; "" for code of ours."""
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(PACKAGE) or not frame.filename.startswith((*installed, "<"))
    ]
    if not frames or frames[-1].filename.startswith(PACKAGE):
        return ""
    return f" in {frames[-1].filename}, line {frames[-1].lineno}"


def mendable(error: BaseException) -> bool:
    """Whether a user has caused it, so that one line says all that a traceback would."""
    return isinstance(error, (UserError, OSError)) or of_composition(error) or _no_memory(error)


def _no_memory(error: BaseException) -> bool:
    """Whether memory was refused, of which torch makes a `RuntimeError`."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )


def of_composition(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf has raised it, of whatever type it is."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals["__name__"].partition(".")[0] if frames else ""
    ours = isinstance(error, (HydraException, OmegaConfBaseException))
    return ours or raised_in in ("hydra", "omegaconf")


def _quoted(error: OverrideParseException) -> str:
    """What is wrong with an override that Hydra cannot read, and how it is written if it can be."""
    override = str(error.override)
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is no override: they read key=value, +key=value or ~key"
    quoted = '{}="{}"'.format(key, value.replace("\\", "\\\\").replace('"', '\\"'))
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return f"{override} cannot be read: the key, too, has characters that Hydra knows not"
    return (
        f"{override}: a value with ~, =, spaces or letters beyond ASCII is written in quotes of "
        f"its own: {shlex.quote(quoted)}"
    )


def _explain_composition(error: BaseException) -> str:
    if isinstance(error, OverrideParseException):
        return _quoted(error)
    if isinstance(error, AssertionError):  # Hydra's own, about itself
        return "Hydra cannot compose this command line: see the value of each group"
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    details = ("full_key:", "object_type=", "reference_type=", "See https")
    message = "; ".join(line for line in lines if line and not line.startswith(details))
    if message.startswith("Config group override"):
        return f"{message}: a group takes the name of a file of conf/, as in parity=off"
    if not isinstance(cause, OmegaConfBaseException):
        place = re.search(r"full_key: (.+)", str(error))
        message = f"{place[1]}: {message}" if place else message
    key = str(getattr(cause, "key", None))
    parent = getattr(cause, "parent_node", None)
    if "not in" in str(cause) and isinstance(parent, DictConfig):
        group = parent._get_full_key(None) or "config"
        if group == "trainer" and key in REFUSED_TRAINER_ARGUMENTS:
            return f"trainer.{key} is refused: {REFUSED_TRAINER_ARGUMENTS[key]}"
        of = f"{group}={parent.get('name')}" if group == "loss" else group
        message = unknown(f"key of {of}", key, [str(name) for name in parent])
        if group == "trainer":
            message += f" (+trainer.{key}=… goes to Lightning's Trainer)"
    elif isinstance(cause, OmegaConfBaseException) and cause.full_key:
        message = f"{cause.full_key}: {str(cause.msg or cause).splitlines()[0]}"
    return EXCEPTION_NAME.sub("", message)
