"""What a network does is seen, whatever its layers are called, and nothing is seen that is not."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from equiloss import randomness
from equiloss.models.dropout import RowKeys, key_dropout
from equiloss.models.networks import MLP, ConvNet
from equiloss.preflight.behaviour import Effect, by_row, look

DRAWS, NEIGHBOURS, LEARNS, COUNTS, REMEMBERS, EVALUATION, UNKNOWN = Effect


class Own(nn.Module):
    """A linear network whose features pass through a function of the user's."""

    def __init__(self, change: Callable[..., Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.change = change
        self.head = nn.Linear(8, 3)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.change(self, self.linear(images.flatten(1))))


class Recurrent(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


class Attending(nn.Module):
    def __init__(self, dropout: float, *, over_batch: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout, batch_first=not over_batch)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.squeeze(1)
        return self.head(self.attention(rows, rows, rows)[0].flatten(1))


def stacked(*layers: nn.Module) -> nn.Module:
    """Layers between a convolution and a head."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), *layers, nn.Flatten(), nn.Linear(32, 3))


def functional_batch_norm(own: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, own.mean, own.var, training=own.training)


def moving_average(own: Any, x: Tensor) -> Tensor:
    if own.training:
        own.mean.lerp_(x.detach().mean(0), 0.1)
    return x  # what evaluation makes of it is another matter


def running_maximum(own: Any, x: Tensor) -> Tensor:
    if own.training:
        own.mean.copy_(torch.maximum(own.mean, x.detach().amax(0)))
    return x


def stochastic_depth(own: Any, x: Tensor) -> Tensor:
    kept = torch.rand(len(x), 1) < 0.8 if own.training else torch.ones(len(x), 1)
    return x + x.tanh() * kept.to(x.dtype)


def counted(own: Any, x: Tensor) -> Tensor:
    if own.training:
        own.passes.add_(1)
    return x


def with_own_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return Own(lambda _, x: x + torch.rand(x.shape, generator=generator))


def with_a_counter() -> nn.Module:
    passes = count()
    return Own(lambda _, x: x * (1 + 0.1 * next(passes)))


def gumbel(own: Any, x: Tensor) -> Tensor:
    return F.gumbel_softmax(x) if own.training else x.softmax(-1)


def ghost_batch_norm(_: Any, x: Tensor) -> Tensor:
    return torch.cat([part - part.mean(0) for part in x.split(2)])


def by_numpy(own: Any, x: Tensor) -> Tensor:
    return x + torch.as_tensor(np.random.rand(*x.shape)).to(x) * own.training


def by_python(own: Any, x: Tensor) -> Tensor:
    return x * (random.random() if own.training else 0.5)


def buffers() -> dict[str, Tensor]:
    return {"mean": torch.zeros(8), "var": torch.ones(8)}


EFFECTS: dict[str, tuple[Callable[[], nn.Module], set[Effect], str]] = {
    "functional dropout": (
        lambda: Own(lambda own, x: F.dropout(x, 0.5, own.training)),
        {DRAWS},
        "the network itself (Own)",
    ),
    "stochastic depth": (lambda: Own(stochastic_depth), {DRAWS}, "the network itself (Own)"),
    "Gumbel noise": (lambda: Own(gumbel), {DRAWS}, "the network itself (Own)"),
    "LSTM dropout": (lambda: Recurrent(0.5), {DRAWS}, "lstm (LSTM)"),
    "attention dropout": (lambda: Attending(0.5), {DRAWS}, "attention (MultiheadAttention)"),
    "added noise": (
        lambda: Own(lambda own, x: x + torch.randn_like(x) * own.training),
        {DRAWS},
        "the network itself (Own)",
    ),
    "RReLU": (lambda: stacked(nn.RReLU()), {DRAWS}, "1 (RReLU)"),
    "NumPy's noise": (lambda: Own(by_numpy), {DRAWS}, "the network itself (Own)"),
    "Python's noise": (lambda: Own(by_python), {DRAWS}, "the network itself (Own)"),
    "dropout of channels": (lambda: stacked(nn.Dropout2d()), {DRAWS}, "1 (Dropout2d)"),
    "alpha dropout": (lambda: stacked(nn.AlphaDropout()), {DRAWS}, "1 (AlphaDropout)"),
    "dropout that stays on": (
        lambda: Own(lambda _, x: F.dropout(x, 0.5, training=True)),
        {DRAWS, EVALUATION},
        "the network itself (Own)",
    ),
    "batch norm": (
        lambda: stacked(nn.BatchNorm2d(8)),
        {NEIGHBOURS, LEARNS},
        "1 (BatchNorm2d)",
    ),
    "batch norm without running statistics": (
        lambda: stacked(nn.BatchNorm2d(8, track_running_stats=False)),
        {NEIGHBOURS, EVALUATION},
        "1 (BatchNorm2d)",
    ),
    "functional batch norm": (
        lambda: Own(functional_batch_norm, **buffers()),
        {NEIGHBOURS, LEARNS},
        "the network itself (Own)",
    ),
    "statistics over the batch": (
        lambda: Own(lambda _, x: x - x.mean(0)),
        {NEIGHBOURS, EVALUATION},
        "the network itself (Own)",
    ),
    "ghost batch norm": (
        lambda: Own(ghost_batch_norm),
        {NEIGHBOURS, EVALUATION},
        "the network itself (Own)",
    ),
    "attention over the batch": (
        lambda: Attending(0.0, over_batch=True),
        {NEIGHBOURS, EVALUATION},
        "attention (MultiheadAttention)",
    ),
    "a share of the batch": (
        lambda: Own(lambda own, x: x / len(x) if own.training else x),
        {NEIGHBOURS},
        "the network itself (Own)",
    ),
    "a sum of the rows before": (
        lambda: Own(lambda _, x: x.cumsum(0)),
        {NEIGHBOURS, EVALUATION},
        "the network itself (Own)",
    ),
    "a sum of the rows after": (
        lambda: Own(lambda _, x: x.flip(0).cumsum(0).flip(0)),
        {NEIGHBOURS, EVALUATION},
        "the network itself (Own)",
    ),
    "a mixture with the next row": (
        lambda: Own(lambda own, x: 0.9 * x + 0.1 * x.roll(-1, 0) if own.training else x),
        {NEIGHBOURS},
        "the network itself (Own)",
    ),
    "instance norm with running statistics": (
        lambda: stacked(nn.InstanceNorm2d(8, track_running_stats=True)),
        {LEARNS},
        "1 (InstanceNorm2d)",
    ),
    "moving averages": (
        lambda: Own(moving_average, **buffers()),
        {LEARNS},
        "the network itself (Own)",
    ),
    "a running maximum": (
        lambda: Own(running_maximum, **buffers()),
        {LEARNS},
        "the network itself (Own)",
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(16, 3))),
        {COUNTS},
        "1.parametrizations.weight.0 (_SpectralNorm)",
    ),
    "a counter in a buffer": (
        lambda: Own(counted, passes=torch.zeros(())),
        {COUNTS},
        "the network itself (Own)",
    ),
    "a generator of its own": (
        with_own_generator,
        {REMEMBERS, EVALUATION},
        "the network itself (Own)",
    ),
    "a counter of Python's": (with_a_counter, {REMEMBERS, EVALUATION}, "the network itself (Own)"),
}


def shared() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, second, nn.Linear(16, 3))


def frozen() -> nn.Module:
    model = stacked(nn.GroupNorm(2, 8))
    model[0].requires_grad_(requires_grad=False)
    return model


class FrozenStatistics(nn.BatchNorm2d):
    """Batch norm as fine-tuning has it."""

    def train(self, _mode: bool = True) -> nn.Module:
        return super().train(mode=False)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def makes_float32(own: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), own.scale)


INVARIANT: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: ConvNet(3, 1, widths=(8,), dropout=0.2),
    "ours, flat": lambda: MLP(3, 16, widths=(8, 8, 8), dropout=0.2),
    "group norm": lambda: stacked(nn.GroupNorm(2, 8)),
    "layer norm": lambda: stacked(nn.LayerNorm([8, 2, 2])),
    "instance norm": lambda: stacked(nn.InstanceNorm2d(8)),
    "local response norm": lambda: stacked(nn.LocalResponseNorm(2)),
    "dropout": lambda: stacked(nn.Dropout(0.5)),
    "weight norm": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.weight_norm(nn.Linear(16, 3))
    ),
    "weight norm that cannot be copied": lambda: nn.Sequential(
        nn.Flatten(), old_weight_norm(nn.Linear(16, 3))
    ),
    "orthogonal": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.orthogonal(nn.Linear(16, 3))
    ),
    "shared parameters": shared,
    "frozen parameters": frozen,
    "frozen statistics": lambda: stacked(FrozenStatistics(8)),
    "checkpointing": lambda: Own(lambda _, x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "attention": lambda: Attending(0.0),
    "recurrence": lambda: Recurrent(0.0),
    "constants of float32": lambda: Own(makes_float32, scale=torch.eye(8)),
}


def images(rows: int) -> Tensor:
    return torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def seen(model: nn.Module) -> dict[Effect, str]:
    row_keys = RowKeys(0)
    key_dropout(model, row_keys)
    return {effect: module for effect, module, _ in look(model, images, row_keys)}


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_is_seen_where_it_happens(name: str) -> None:
    make, effects, module = EFFECTS[name]
    torch.manual_seed(0)
    found = seen(make())
    assert found.keys() == effects
    assert set(found.values()) == {module}


@pytest.mark.parametrize("name", INVARIANT)
def test_what_is_invariant_is_not_accused(name: str) -> None:
    torch.manual_seed(0)
    assert seen(INVARIANT[name]()) == {}


def test_it_is_batch_norm_alone_or_more() -> None:
    def of_batch_norm(*layers: nn.Module) -> set[bool]:
        found = look(stacked(nn.BatchNorm2d(8), *layers), images, RowKeys(0))
        return {each.batch_norm for each in found if each.effect == NEIGHBOURS}

    assert of_batch_norm() == of_batch_norm(Doubled(8), nn.SyncBatchNorm(8)) == {True}
    assert of_batch_norm(Centred()) == {False}


def test_batch_norm_that_computes_its_statistics_itself_is_named() -> None:
    found = look(stacked(nn.BatchNorm2d(8), nn.ReLU(), Itself(8)), images, RowKeys(0))
    seen = {(each.effect, each.module, each.batch_norm) for each in found}
    assert seen == {(effect, "3 (Itself)", False) for effect in (NEIGHBOURS, LEARNS)}


class Doubled(nn.BatchNorm2d):
    """It goes over all ranks with what is torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Itself(nn.BatchNorm2d):
    """It does not: torch's forward pass is not called."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("copies", [True, False])
def test_the_network_and_the_generators_are_left_as_they_were(
    copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(stacked(nn.BatchNorm2d(8), nn.RReLU()))
    if not copies:
        monkeypatch.delattr("equiloss.preflight.behaviour.copy.deepcopy")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = randomness.state(torch.device("cpu"))
    assert {each.effect for each in look(model, images, RowKeys(0))} == {DRAWS, NEIGHBOURS, LEARNS}
    after = randomness.state(torch.device("cpu"))
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_looked_at_is_unknown_and_what_cannot_be_read_is_left_to_the_run() -> None:
    def unreadable(_: int) -> Tensor:
        raise OSError("no such file")

    assert look(stacked(nn.RReLU()), unreadable, RowKeys(0)) == []
    found = look(nn.Linear(3, 3), images, RowKeys(0))
    assert found == [(UNKNOWN, "the network itself (Linear)", False)]
    assert not by_row(found)
