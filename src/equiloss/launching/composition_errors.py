"""Errors of every kind in one line."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from equiloss.config import REFUSED_TRAINER_ARGUMENTS
from equiloss.errors import UserError, unknown
from equiloss.records.writing import refusal


def explain(error: BaseException) -> str:
    """One line that names the culprit, the rule and the choices.

    >>> explain(UserError("seed must lie in [0, 2**32), got -1"))
    'seed must lie in [0, 2**32), got -1'
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group or "config", name, error.options or [])
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_composition(error)
    # The logging module makes a ValueError of a log file that cannot be opened.
    for refused in (error, error.__cause__):
        if isinstance(refused, OSError) and refused.errno is not None:
            return refusal(refused)
    return f"{type(error).__name__}: {error}"


def _explain_composition(error: BaseException) -> str:
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    details = ("full_key:", "object_type=", "reference_type=", "See https")
    message = "; ".join(line for line in lines if line and not line.startswith(details))
    key = str(getattr(cause, "key", None))
    parent = getattr(cause, "parent_node", None)
    if "not in" in str(cause) and isinstance(parent, DictConfig):
        group = parent._get_full_key(None) or "config"
        if group == "trainer" and key in REFUSED_TRAINER_ARGUMENTS:
            return f"trainer.{key} is refused: {REFUSED_TRAINER_ARGUMENTS[key]}"
        message = unknown(f"key of {group}", key, [str(name) for name in parent])
        if group == "trainer":
            message += f" (+trainer.{key}=… goes to Lightning's Trainer)"
    elif isinstance(cause, OmegaConfBaseException) and cause.full_key:
        message = f"{cause.full_key}: {str(cause.msg or cause).splitlines()[0]}"
    return message
