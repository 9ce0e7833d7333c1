"""Losses: pure per-sample functions, their registry, and the one place that reduces.

`names()` lists what is registered, `get(name)` gives the per-sample function, `register` adds
one, and `Criterion(name, **options)` turns logits and targets into a sum and its mass.

>>> from equiloss import losses
>>> "cross_entropy" in losses.names()
True
"""

from typing import TYPE_CHECKING, Any

from equiloss.losses.registry import get, names, register

if TYPE_CHECKING:
    from equiloss.losses.criterion import Criterion, LossSum

__all__ = ["Criterion", "LossSum", "get", "names", "register"]


def __getattr__(name: str) -> Any:
    # Criterion needs torch. Listing the losses, as Hydra's --help does, must not wait for it.
    if name in ("Criterion", "LossSum"):
        from equiloss.losses import criterion

        return getattr(criterion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
