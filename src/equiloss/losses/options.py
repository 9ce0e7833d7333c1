"""The domain of a loss's options, checked where they are used."""

from __future__ import annotations

from equiloss.errors import LossError


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
