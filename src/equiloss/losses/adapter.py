"""Losses written as torch writes them, (input, target, …, reduction="mean"), as ours are written.

`F.multi_margin_loss`, `F.cross_entropy` and many losses of other libraries can be told not to
reduce, so they are per-sample losses already. What their signatures do not say is found out by
asking them, on a small batch: whether they take class probabilities, and whether their own mean
is the one of this project.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equiloss.errors import LossError

if TYPE_CHECKING:
    from torch import Tensor

REDUCTION = "reduction"
# Older names for the same thing.
DEPRECATED = ("size_average", "reduce")
OF_CALLS = ("weight", "ignore_index", "label_smoothing")
WEIGHTED_MEAN = (
    "its own weighted mean is not the sum over the weights' sum, which is this project's: the "
    "result would be another loss than its documentation says"
)


def adapted(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss with torch's signature as `(logits, target, *, …) -> [N]`; any other as it is.

    Args:
        name: The loss's name, for error messages.
        loss: A function or nn.Module class.

    Raises:
        LossError: if it takes a `reduction` and does not return one value per row without one.

    >>> import torch.nn.functional as F
    >>> from equiloss.losses.signature import read
    >>> hinge = read("hinge", adapted("hinge", F.multi_margin_loss))
    >>> sorted(hinge.options), sorted(hinge.refused)
    (['margin', 'p'], ['weight'])
    """
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return loss
    if REDUCTION not in parameters or getattr(loss, "per_sample", False):
        return loss
    return _module(name, loss) if isinstance(loss, type) else _function(name, loss)


def _function(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    def per_sample(logits: Tensor, target: Tensor, **keywords: Any) -> Any:
        return loss(logits, target, reduction="none", **keywords)

    options = [
        parameter
        for parameter in list(inspect.signature(loss).parameters.values())[2:]
        if parameter.name not in (REDUCTION, *DEPRECATED)
    ]
    refused = {}
    _check_rows(name, per_sample)
    if any(option.name == "weight" for option in options) and not _mean_is_ours(loss):
        refused["weight"] = WEIGHTED_MEAN
        options = [option for option in options if option.name != "weight"]
    attributes = vars(loss) | {
        "per_sample": True,
        "refused": refused,
        "soft_targets": _takes_probabilities(per_sample),
        "__signature__": _signature(options),
        "__annotations__": {option.name: option.annotation for option in options},
        "__name__": getattr(loss, "__name__", name),
        "__doc__": loss.__doc__,
    }
    for key, value in attributes.items():
        setattr(per_sample, key, value)
    return per_sample


def _module(name: str, loss: type) -> type:
    from torch import nn

    class PerSample(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.loss = loss(**options, reduction="none")

        def forward(self, logits: Tensor, target: Tensor) -> Any:
            return self.loss(logits, target)

    options = [
        parameter
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.name not in (REDUCTION, *DEPRECATED, *OF_CALLS)
    ]
    _check_rows(name, lambda logits, target: PerSample()(logits, target))
    named = inspect.signature(loss).parameters
    PerSample.__init__.__signature__ = _signature(options, "self")  # type: ignore[attr-defined]
    PerSample.__init__.__annotations__ = {option.name: option.annotation for option in options}
    PerSample.__name__, PerSample.__doc__ = loss.__name__, loss.__doc__
    PerSample.per_sample = True  # type: ignore[attr-defined]
    PerSample.refused = {  # type: ignore[attr-defined]
        key: "as a module it fixes this when it is made: use the function behind it"
        for key in OF_CALLS
        if key in named
    }
    return PerSample


def _signature(options: list[inspect.Parameter], *leading: str) -> inspect.Signature:
    names = leading or ("logits", "target")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            *(inspect.Parameter(name, kind) for name in names),
            *(option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options),
        ]
    )


def _batch() -> tuple[Tensor, Tensor]:
    """Logits [4, 3] and classes [4] that no two rows and no two classes share."""
    import torch

    logits = torch.tensor(
        [[0.5, -1.0, 2.0], [1.5, 0.0, -0.5], [-2.0, 1.0, 0.25], [0.75, 0.5, -1.5]],
        dtype=torch.float64,
    )
    return logits, torch.tensor([0, 2, 1, 0])


def _check_rows(name: str, per_sample: Callable[..., Any]) -> None:
    logits, target = _batch()
    try:
        losses = per_sample(logits, target)
    except Exception as error:
        raise LossError(
            f"loss {name!r} takes a {REDUCTION!r}, and fails on logits [4, 3] with classes [4] and "
            f"{REDUCTION}='none': {type(error).__name__}: {error}"
        ) from error
    shape = list(getattr(losses, "shape", ()))
    if shape != [len(target)]:
        raise LossError(
            f"loss {name!r} returned {shape} for 4 rows with {REDUCTION}='none': a loss returns "
            "one value per row [N]"
        )


def _mean_is_ours(loss: Callable[..., Any]) -> bool:
    """Whether its weighted mean is the sum of its rows over the sum of their weights."""
    import torch

    logits, target = _batch()
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    rows = loss(logits, target, weight=weight, reduction="none")
    mean = loss(logits, target, weight=weight, reduction="mean")
    # Float64, and a few roundings.
    return bool(torch.isclose(mean, rows.sum() / weight[target].sum(), rtol=1e-9))


def _takes_probabilities(per_sample: Callable[..., Any]) -> bool:
    """Whether one-hot probabilities give what the classes give."""
    import torch

    logits, target = _batch()
    one_hot = torch.nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
    try:
        losses = per_sample(logits, one_hot)
    except Exception:  # whatever a loss does about targets that it does not take
        return False
    expected = per_sample(logits, target)
    return losses.shape == expected.shape and bool(torch.allclose(losses, expected, rtol=1e-9))
