"""What a loss can do, read from how it is written.

A loss is a function `(logits, target, *, …) -> [N]`. The reserved keyword-only names `weight`,
`ignore_index`, `label_smoothing` and `class_counts` mean "supported"; every other keyword is an
option of the loss's own. What a signature cannot say is an attribute of the function.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from omegaconf import MISSING

from equiloss.errors import LossError

# How a loss begins, and whether it wants the head's input instead of the logits.
HEAD_WEIGHT, HEAD_BIAS = "head_weight", "head_bias"
LEADING = {("logits", "target"): False, ("features", HEAD_WEIGHT, "target"): True}
RESERVED = ("weight", "ignore_index", "label_smoothing", "class_counts")

LossFunction = Callable[..., Any]
_F = TypeVar("_F", bound=LossFunction)


def describes(**attributes: Any) -> Callable[[_F], _F]:
    """Set attributes of a loss, such as `soft_targets=True`, where it is defined."""

    def decorate(loss: _F) -> _F:
        for name, value in attributes.items():
            setattr(loss, name, value)
        return loss

    return decorate


@dataclass(frozen=True)
class Option:
    """A keyword of a loss: what Hydra may put there."""

    annotation: Any
    """Type that OmegaConf checks; Any where it knows none."""
    default: Any
    """Default value, or omegaconf.MISSING where the loss requires one."""
    choices: tuple[Any, ...] = ()
    """What a Literal annotation allows; None among them where it is optional."""


@dataclass(frozen=True)
class Signature:
    """Capabilities and options of one loss."""

    options: Mapping[str, Option]
    """Every configurable keyword, reserved ones included, in the order of the signature."""
    supported: frozenset[str]
    """Which of the reserved names the loss takes."""
    wants_features: bool
    """Takes the input of the network's head and the head, not the logits."""
    takes_head_bias: bool
    """Takes the head's bias beside its weight."""
    soft_targets: bool
    """Takes class probabilities [N, C] as targets."""
    shift_invariant: bool | Callable[[Mapping[str, Any]], bool]
    """loss(x + c) equals loss(x): whether it holds, or a function of the options that tells."""
    max_logit_range: Any
    """Largest logsumexp(x) - min(x) it is sound for: None, a float, or dtype -> float."""
    min_class_count: int
    """Fewest training rows of a class that it is defined for (with `class_counts`)."""
    reference: str | None
    """The paper that it comes from."""
    refused: Mapping[str, str]
    """Keywords that it has and that are not offered here, with the reason."""

    def domain(self, dtype: Any) -> float:
        """Largest logsumexp(x) - min(x) that the loss is sound for in `dtype`."""
        if callable(self.max_logit_range):
            return float(self.max_logit_range(dtype))
        return float("inf") if self.max_logit_range is None else float(self.max_logit_range)

    def is_shift_invariant(self, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Whether loss(x + c) equals loss(x) with these options; those not named are defaults.

        >>> def loss(logits, target, *, z_loss: float = 0.0): ...
        >>> loss.shift_invariant = lambda options: options["z_loss"] == 0
        >>> signature = read("loss", loss)
        >>> signature.is_shift_invariant(), signature.is_shift_invariant({"z_loss": 1e-4})
        (True, False)
        """
        if callable(self.shift_invariant):
            defaults = {key: option.default for key, option in self.options.items()}
            return bool(self.shift_invariant(defaults | dict(options)))
        return self.shift_invariant


def read(name: str, loss: LossFunction) -> Signature:
    """Read the signature of a loss: a function, or an nn.Module class.

    A module class has its options in `__init__` and its reserved names in `forward`.

    Args:
        name: The registered name, for error messages.
        loss: The function or class.

    Raises:
        LossError: if it does not begin with (logits, target) or (features, head_weight, target),
            or has further positional arguments.

    >>> def poly1(logits, target, *, epsilon: float = 1.0, ignore_index: int = -100): ...
    >>> signature = read("poly1", poly1)
    >>> sorted(signature.options), sorted(signature.supported)
    (['epsilon', 'ignore_index'], ['ignore_index'])
    """
    if inspect.isclass(loss):
        forward: LossFunction = getattr(loss, "forward", loss.__call__)
        call, call_hints = _keywords(name, forward, skip_self=True)
        wants_features = _leading(name, forward, skip_self=True)
        takes_bias = wants_features and call.pop(HEAD_BIAS, None) is not None
        made: dict[str, inspect.Parameter] = {}
        hints: dict[str, Any] = {}
        maker = next(base for base in loss.__mro__ if "__init__" in vars(base))
        if maker.__module__ != "torch.nn.modules.module":  # nn.Module's own takes anything
            made, hints = _keywords(name, loss, skip_self=False)
        for key in (*(key for key in made if key in RESERVED), *(set(call) - set(RESERVED))):
            raise LossError(
                f"loss {name!r} takes {key!r} in the wrong place: a module has "
                f"{', '.join(RESERVED)} in forward, and every other option in __init__"
            )
        keywords = {**made, **{key: call[key] for key in call if key in RESERVED}}
        hints = {**call_hints, **hints}
        supported = frozenset(call) & set(RESERVED)
    else:
        wants_features = _leading(name, loss, skip_self=False)
        keywords, hints = _keywords(name, loss, skip_self=False)
        takes_bias = wants_features and keywords.pop(HEAD_BIAS, None) is not None
        supported = frozenset(keywords) & set(RESERVED)
    if "name" in keywords:
        raise LossError(f"loss {name!r} has an option 'name': loss.name is the name of the loss")
    shift_invariant = getattr(loss, "shift_invariant", True)
    return Signature(
        options={
            key: _option(key, parameter, hints)
            for key, parameter in keywords.items()
            if key != "class_counts"
        },
        supported=supported,
        wants_features=wants_features,
        takes_head_bias=takes_bias,
        soft_targets=bool(getattr(loss, "soft_targets", False)),
        shift_invariant=shift_invariant if callable(shift_invariant) else bool(shift_invariant),
        max_logit_range=getattr(loss, "max_logit_range", None),
        min_class_count=int(getattr(loss, "min_class_count", 0)),
        reference=getattr(loss, "reference", None),
        refused=getattr(loss, "refused", {}),
    )


def _parameters(name: str, function: LossFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise LossError(f"loss {name!r} has no signature to read its options from") from error


def _leading(name: str, function: LossFunction, *, skip_self: bool) -> bool:
    """Whether a loss wants features, by the arguments that it begins with."""
    positional = [
        parameter.name
        for parameter in _parameters(name, function)
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][skip_self:]
    if tuple(positional) not in LEADING:
        raise LossError(
            f"loss {name!r} has the positional arguments ({', '.join(positional)}): a loss is "
            "written (logits, target, *, …) or (features, head_weight, target, *, …), everything "
            "after these being keyword-only"
        )
    return LEADING[tuple(positional)]


def _keywords(
    name: str, function: LossFunction, *, skip_self: bool
) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    parameters = _parameters(name, function)[skip_self:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise LossError(
                f"loss {name!r} takes *{parameter.name}: name every option, since the signature "
                "is what its configuration is made from"
            )
    target = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(target)
    except (NameError, TypeError):
        # One annotation that cannot be resolved fails the whole call: the defaults' types serve.
        hints = {}
    leading = {name for names in LEADING for name in names}
    return {p.name: p for p in parameters if p.name not in leading}, hints


def _option(key: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Option:
    default = MISSING if parameter.default is parameter.empty else parameter.default
    if key == "weight":
        # null, `balanced` or a list: the criterion turns it into a tensor.
        return Option(Any, None)
    annotation = hints.get(key, Any if default in (None, MISSING) else type(default))
    choices = _choices(annotation)
    if choices:
        return Option(str if {*map(type, choices)} == {str} else Any, default, choices)
    return Option(annotation if _is_plain(annotation) else Any, default)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a Literal allows, alone or with None; () for another annotation.

    >>> _choices(typing.Literal[1, 2]), _choices(typing.Literal["a"] | None), _choices(float)
    ((1, 2), ('a', None), ())
    """
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [
            (None,) if part is type(None) else _choices(part)
            for part in typing.get_args(annotation)
        ]
        if all(parts) and parts != [(None,)]:
            return tuple(choice for part in parts for choice in part)
    return ()


def _is_plain(annotation: Any) -> bool:
    """Whether OmegaConf checks values of this type.

    >>> _is_plain(list[float]), _is_plain(dict[str, int] | None), _is_plain(tuple[int, int])
    (True, True, False)
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(_is_plain(part) for part in inner if part is not type(None))
    if origin in (list, dict):
        return all(part in (bool, int, float, str) for part in inner)
    return annotation in (bool, int, float, str)


def config_node(name: str, options: Mapping[str, Option]) -> Any:
    """The Hydra node of a loss: a dataclass instance with its name and its options.

    >>> def scaled(logits, target, *, factor: float = 2.0): ...
    >>> config_node("scaled", read("scaled", scaled).options)
    scaled(name='scaled', factor=2.0)
    """
    members: list[Any] = [("name", str, name)]
    for key, option in options.items():
        value = option.default
        if isinstance(value, (list, dict)):
            members.append((key, option.annotation, dataclasses.field(default_factory=value.copy)))
        else:
            members.append((key, option.annotation, value))
    return dataclasses.make_dataclass(name, members)()
