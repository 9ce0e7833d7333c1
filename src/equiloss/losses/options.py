"""What options a loss takes, and their domains: checked before a batch, or where they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from equiloss.errors import LossError, first_line, unknown
from equiloss.losses.registry import CUSTOM
from equiloss.losses.signature import Signature, config_node


def require(condition: bool, rule: str, value: object) -> None:
    """Raise unless an option lies in its domain.

    Args:
        condition: Whether it does; a comparison with NaN is False.
        rule: What the message says, such as `loss.gamma must be at least 0`.
        value: What was given.

    Raises:
        LossError: naming the rule and the value.

    >>> require(-1 >= 0, "loss.gamma must be at least 0", -1)
    Traceback (most recent call last):
    equiloss.errors.LossError: loss.gamma must be at least 0, got -1
    """
    if not condition:
        raise LossError(f"{rule}, got {value}")


def checked(name: str, signature: Signature, options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse options that a loss has not, that it requires, or that lie out of their range.

    Returns:
        The options: those of a loss by import path with the types of its signature, and mappings
        merged into their defaults, as Hydra does it for a registered one.

    Raises:
        LossError: naming the option and the choices.
    """
    for key, value in options.items():
        if key not in signature.options:
            if key in ("weight", "label_smoothing") and (value is None or _is_zero(value)):
                continue
            if key in signature.refused:
                raise LossError(f"loss {name!r} takes no {key} here: {signature.refused[key]}")
            raise LossError(unknown(f"option of loss {name!r}", key, signature.options))
        choices = signature.options[key].choices
        if choices and value not in choices:
            known = ["null" if choice is None else str(choice) for choice in choices]
            raise LossError(unknown(f"value of loss.{key}", str(value), known))
    required = [
        key
        for key, option in signature.options.items()
        if option.default == "???" and options.get(key, "???") == "???"
    ]
    if required:
        raise LossError(f"loss {name!r} requires {', '.join(f'loss.{key}' for key in required)}")
    smoothing = options.get("label_smoothing", 0.0)
    if "label_smoothing" in signature.options and not (
        isinstance(smoothing, (int, float)) and 0 <= smoothing <= 1
    ):
        raise LossError(f"loss.label_smoothing must lie in [0, 1], got {smoothing}")
    return _typed(signature, options) if name == CUSTOM else dict(options)


def _typed(signature: Signature, options: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        key: value
        for key, value in options.items()
        if key in signature.options and not isinstance(value, Tensor)  # of a call from Python
    }
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(config_node(CUSTOM, signature.options)), known
        )
    except OmegaConfBaseException as error:
        key, why = getattr(error, "full_key", None), first_line(error)
        raise LossError(f"loss.options.{key}: {why}" if key else f"loss.options: {why}") from error
    plain = cast(dict[str, Any], OmegaConf.to_container(merged))
    return {**options, **{key: plain[key] for key in known}}


def check_counts(name: str, counts: Tensor, fewest: int) -> None:
    """Refuse class counts [C] of which one is below `fewest`; raises `LossError`."""
    few = (counts < fewest).nonzero().flatten().tolist()
    if few:
        raise LossError(
            f"loss {name!r} is undefined: class {few[0]} has {int(counts[few[0]])} training "
            f"samples and needs at least {fewest}"
        )


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def class_weights(name: str, weight: Any, counts: Tensor | None) -> Tensor:
    """Class weights [C] in float64 from `"balanced"` or one number per class."""
    if isinstance(weight, str):
        if weight != "balanced":
            raise LossError(f"loss.weight must be null, 'balanced' or a list, got {weight!r}")
        if counts is None:
            raise LossError(
                f"loss {name!r} with weight=balanced needs class_counts, the rows of each "
                "training class"
            )
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise LossError(
                f"loss.weight=balanced is undefined: class {empty[0]} has no training sample"
            )
        return counts.sum() / (len(counts) * counts.double())
    try:
        values = torch.as_tensor(weight, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError) as error:
        raise LossError(f"loss.weight must be null, 'balanced' or a list: {error}") from error
    wrong = [w for w in values.flatten().tolist() if not (math.isfinite(w) and w >= 0)]
    if values.ndim != 1 or wrong:
        raise LossError(
            "loss.weight needs one finite, non-negative number per class; got "
            f"{wrong[0] if wrong else list(values.shape)}"
        )
    return values
