"""What a network's numbers depend on besides a sample and the weights, found by watching it.

A few rows of the real data pass through a copy of the network in float64, so that rounding cannot
be taken for an effect. What is looked at is what a forward pass does, never what a layer is called.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equiloss import randomness
from equiloss.errors import UserError
from equiloss.models.dropout import RowKeys

CPU = torch.device("cpu")
ROWS = 3
# The row whose way is followed has one before it and one after: attention, say, may be causal.
FOLLOWED = 1


class Effect(StrEnum):
    """What a network may do that makes its numbers depend on how the work is split."""

    DRAWS = "draws"
    """A training pass advances a random generator: the masks of `nn.Dropout` do not, here."""
    NEIGHBOURS = "neighbours"
    """A row's logits in training depend on the rows beside it."""
    LEARNS = "learns"
    """A training pass changes buffers, by the rows that it is given."""
    COUNTS = "counts"
    """A training pass changes buffers, whatever rows it is given."""
    REMEMBERS = "remembers"
    """The same training pass gives other logits the second time."""
    EVALUATION = "evaluation"
    """A row's logits in evaluation are others the second time, or beside other rows."""
    UNKNOWN = "unknown"
    """It could not pass the rows, so that nothing was seen."""


class Found(NamedTuple):
    """One effect, and where it was seen."""

    effect: Effect
    module: str
    """Path and type of the innermost module that shows it."""
    batch_norm: bool = False
    """Whether batch normalisation that goes over all ranks is all that shows it."""


def by_row(found: Iterable[Found]) -> bool:
    """Whether a row's logits in training are a function of the row and the weights alone."""
    others = {Effect.DRAWS, Effect.NEIGHBOURS, Effect.REMEMBERS, Effect.UNKNOWN}
    return others.isdisjoint(each.effect for each in found)


def look(
    model: nn.Module, example_images: Callable[[int], Tensor], row_keys: RowKeys
) -> list[Found]:
    """Watch a network with some images; its buffers and the generators are left as they were.

    Images that cannot be read are left to the run to tell.

    Args:
        model: Images [n, C, H, W] -> logits [n, K].
        example_images: Gives so many images.
        row_keys: Keys from which the network's dropout layers draw their masks.

    >>> network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    >>> found = look(network, lambda rows: torch.randn(rows, 1, 2, 2), RowKeys(0))
    >>> [(each.effect.value, each.module) for each in found]
    [('neighbours', '1 (BatchNorm1d)'), ('learns', '1 (BatchNorm1d)')]
    """
    try:
        images = example_images(ROWS)
    except Exception:  # whatever a source of one's own raises, its loader will name it
        return []
    generators, training = randomness.state(CPU), model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def copied() -> nn.Module:
        # Keys are bound to the object that the run has.
        return copy.deepcopy(model, {id(row_keys): row_keys})

    # Some networks make tensors of float32, and some, with torch's older weight norm, have no copy.
    subjects: list[Callable[[], nn.Module]] = [
        lambda: copied().to(torch.float64),
        copied,
        lambda: model,
    ]
    try:
        for subject in subjects:
            try:
                with torch.no_grad():
                    watched = subject()
                    dtype = next((p.dtype for p in watched.parameters()), torch.float32)
                    return list(_Watch(watched, images.to(dtype), row_keys).effects())
            except UserError:
                raise  # a network that leaves the process, say: it is not for us to go on
            except Exception:  # whatever a network of one's own raises
                continue
    finally:
        randomness.restore(generators, CPU)
        model.train(training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return [Found(Effect.UNKNOWN, _named("", model))]


class _Seen(NamedTuple):
    """A tensor on its way through a network: the followed row as a module is given, or gives it."""

    module: str
    row: Tensor | None
    drew: bool
    """Whether a generator has moved since the pass began."""


class _Pass(NamedTuple):
    """A forward pass."""

    logits: Tensor
    seen: list[_Seen]


class _Watch:
    """Passes rows through a network that may be changed."""

    def __init__(self, model: nn.Module, images: Tensor, row_keys: RowKeys) -> None:
        self.model = model
        self.images = images
        # An affine change of the other rows changes what is taken of a batch.
        self.beside_others = 1.5 * images + 0.5
        self.beside_others[FOLLOWED] = images[FOLLOWED]
        self.row_keys = row_keys
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.generators = randomness.state(CPU)

    def effects(self) -> Iterator[Found]:
        """Every effect, in the order of `Effect`."""
        first = self._train(self.images)
        changed = self._changed()
        others = self._train(self.beside_others)
        learned = [n for n in changed if not _same(changed[n], self.model.get_buffer(n))]
        if drew := first.seen[-1].drew:
            yield Found(Effect.DRAWS, next(each.module for each in first.seen if each.drew))
        differs = not _same(first.logits[FOLLOWED], others.logits[FOLLOWED])
        plain, itself = first, changed
        if changed or differs:
            with _evaluating(self.model):
                plain = self._train(self.images)
                itself = self._changed()  # also by a class that computes its statistics itself
        if differs:
            yield self._of_neighbours(first, others, plain)
        elif not drew:  # another number of rows draws other numbers
            part = self._train(self.images[:-1])
            if not _same(first.logits[:-1], part.logits):
                yield Found(Effect.NEIGHBOURS, self._parting(first, part))
        for effect, names in (
            (Effect.LEARNS, learned),
            (Effect.COUNTS, [name for name in changed if name not in learned]),
        ):
            owners = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in names}
            # What batch normalisation counts goes with what it learns.
            more = [n for n in names if n in itself or not isinstance(owners[n], _BatchNorm)]
            if more or (names and effect == Effect.LEARNS):
                name = (more or names)[0]
                yield Found(effect, _named(name.rpartition(".")[0], owners[name]), not more)
        first, others = self._evaluate(self.images), self._evaluate(self.beside_others)
        if not _same(first.logits[FOLLOWED], others.logits[FOLLOWED]):
            yield Found(Effect.EVALUATION, self._parting(first, others))

    def _of_neighbours(self, first: _Pass, others: _Pass, plain: _Pass) -> Found:
        """Why a row has other logits beside other rows; `plain` is without batch normalisation."""
        with _evaluating(self.model):
            beside = self._train(self.beside_others)
        if _same(plain.logits[FOLLOWED], beside.logits[FOLLOWED]):
            return Found(Effect.NEIGHBOURS, self._parting(first, others), batch_norm=True)
        again = self._train(self.images)
        if not _same(first.logits, again.logits):
            return Found(Effect.REMEMBERS, self._parting(first, again))
        return Found(Effect.NEIGHBOURS, self._parting(plain, beside))

    def _train(self, images: Tensor) -> _Pass:
        """A training pass from the same state of buffers and generators."""
        randomness.restore(self.generators, CPU)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        self.model.train()
        with self.row_keys.bound_to(torch.arange(len(images)), epoch=0):
            return self._traced(images)

    def _evaluate(self, images: Tensor) -> _Pass:
        self.model.eval()
        return self._traced(images)

    def _changed(self) -> dict[str, Tensor]:
        """Buffers that the last pass has changed."""
        return {
            name: buffer.clone()
            for name, buffer in self.model.named_buffers()
            if not torch.equal(buffer, self.buffers[name])
        }

    def _parting(self, one: _Pass, other: _Pass) -> str:
        """The innermost module in which the followed row's way parts in two passes."""
        pairs = zip(one.seen, other.seen, strict=False)
        parted = (a.module for a, b in pairs if not _same(a.row, b.row))
        return next(parted, _named("", self.model))

    def _traced(self, images: Tensor) -> _Pass:
        """A pass, and what goes into and comes out of each module, in the order of time."""
        seen: list[_Seen] = []
        inside: list[str] = []
        began = _generators()

        def note(module: str, value: Any) -> None:
            value = value[0] if isinstance(value, tuple) and value else value
            has_row = isinstance(value, Tensor) and value.dim() > 0 and len(value) > FOLLOWED
            row = value[FOLLOWED].clone() if has_row else None
            seen.append(_Seen(module, row, _generators() != began))

        def enter(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            # What has changed on the way to here has changed in the module around.
            note(inside[-1] if inside else name, inputs)
            inside.append(name)

        def leave(name: str, _: nn.Module, _inputs: Any, output: Any) -> None:
            inside.pop()
            note(name, output)

        hooks = []
        for path, module in self.model.named_modules():
            name = _named(path, module)
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
        try:
            logits: Tensor = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return _Pass(logits.clone(), seen)


def _generators() -> tuple[Any, ...]:
    """The state of the generators of this process, as it is fast to compare."""
    numpy = np.random.get_state(legacy=False)["state"]
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"], torch_state


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the network itself'} ({type(module).__name__})"


class _Evaluating(_BatchNorm):
    """Makes a batch normalisation evaluate, where `models.batch_norm` has it go over all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name of the argument
        training, self.training = self.training, False
        output = super().forward(input)
        self.training = training
        return output


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have batch normalisation evaluate in training, but for what computes its own statistics."""
    kinds = {module: type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    for module, kind in kinds.items():
        # torch's own goes over them on GPUs.
        order = (_Evaluating, kind) if kind is nn.SyncBatchNorm else (kind, _Evaluating)
        module.__class__ = type(kind.__name__, order, {})
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal but for rounding: by half of their digits."""
    if a is None or b is None or not a.is_floating_point():
        return a is b or (a is not None and b is not None and torch.equal(a, b))
    if a.shape != b.shape:
        return False
    scale = max(1.0, float(a.abs().nan_to_num().max()) if a.numel() else 1.0)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)
