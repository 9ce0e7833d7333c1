"""Losses with torch's signature, by import path: per sample, and with this project's mean."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.errors import LossError
from equiloss.losses import Criterion, get, register
from equiloss.losses.adapter import adapted
from equiloss.losses.registry import unregister
from equiloss.losses.signature import read

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 1, 1, 2, 0, 3])
WEIGHT = [0.5, 1.0, 2.0, 4.0]


def custom(target: str, **options: object) -> Criterion:
    return Criterion("custom", target=f"torch.nn.functional:{target}", options=options)


def mean(criterion: Criterion, target: Tensor = TARGET) -> float:
    found = criterion(LOGITS, target)
    return (found.total / found.mass).item()


@pytest.mark.parametrize("options", [{}, {"p": 2, "margin": 0.5}])
def test_multi_margin_loss(options: dict[str, float]) -> None:
    expected = F.multi_margin_loss(LOGITS, TARGET, **options).item()
    assert mean(custom("multi_margin_loss", **options)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHT}, {"label_smoothing": 0.1, "weight": WEIGHT}]
)
def test_cross_entropy_itself(options: dict[str, object]) -> None:
    criterion, ours = custom("cross_entropy", **options), Criterion("cross_entropy", **options)
    found, expected = criterion(LOGITS, TARGET), ours(LOGITS, TARGET)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.mass, expected.mass)
    assert criterion.signature.supported == {"weight", "ignore_index", "label_smoothing"}
    assert criterion.signature.soft_targets


def test_ignored_rows() -> None:
    target = TARGET.clone()
    target[2] = 9
    expected = F.cross_entropy(LOGITS, target, ignore_index=9).item()
    found = mean(custom("cross_entropy", ignore_index=9), target)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_weighted_mean_that_is_another_is_refused() -> None:
    """torch's multi-margin loss divides by the number of rows, whatever they weigh."""
    with pytest.raises(LossError, match="'custom' takes no weight here: its own weighted mean"):
        custom("multi_margin_loss", weight=WEIGHT)


def test_one_value_per_element_is_refused() -> None:
    with pytest.raises(LossError, match=r"fails on logits \[4, 3\] with classes \[4\]"):
        custom("mse_loss")


def test_a_loss_that_does_not_obey_is_refused() -> None:
    def deaf(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:  # noqa: A002
        return F.cross_entropy(input, target)

    with pytest.raises(LossError, match=r"'deaf' returned \[\] for 4 rows with reduction='none'"):
        adapted("deaf", deaf)


def test_a_loss_of_ours_is_left_as_it_is() -> None:
    assert adapted("cross_entropy", get("cross_entropy")) is get("cross_entropy")


def test_registered_it_becomes_ours() -> None:
    register(F.multi_margin_loss, name="hinge")
    try:
        assert get("hinge")(LOGITS, TARGET).shape == (7,)
        assert list(read("hinge", get("hinge")).options) == ["p", "margin"]
    finally:
        unregister("hinge")


class Scaled(nn.Module):
    """A module with a parameter of its own, written as torch writes modules."""

    def __init__(self, start: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        return F.cross_entropy(input * self.scale, target, reduction=self.reduction)


class TestModules:
    def test_parameters_are_trained(self) -> None:
        criterion = Criterion("custom", target=f"{__name__}:Scaled", options={"start": 2.0})
        found = criterion(LOGITS, TARGET)
        found.total.backward()
        (parameter,) = criterion.parameters()
        assert parameter.item() == 2.0
        assert parameter.grad is not None
        expected = F.cross_entropy(2 * LOGITS, TARGET, reduction="sum").item()
        assert found.total.item() == pytest.approx(expected, rel=1e-6)

    def test_options_are_those_of_the_constructor(self) -> None:
        signature = read("scaled", adapted("scaled", Scaled))
        assert {key: option.default for key, option in signature.options.items()} == {"start": 1.0}

    def test_what_a_module_fixes_when_it_is_made_is_refused(self) -> None:
        with pytest.raises(LossError, match="takes no weight here: as a module it fixes this"):
            Criterion("custom", target="torch.nn:CrossEntropyLoss", options={"weight": WEIGHT})


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in dir(F)
        if name.endswith(("_loss", "cross_entropy"))
        and "reduction" in inspect.signature(getattr(F, name)).parameters
    ],
)
def test_each_of_torchs_losses_is_taken_or_refused_by_name(name: str) -> None:
    loss = getattr(F, name)
    if name in ("cross_entropy", "nll_loss", "multi_margin_loss"):
        assert adapted(name, loss)(LOGITS.double(), TARGET).shape == (7,)
    else:
        with pytest.raises(LossError, match=f"'{name}'"):
            adapted(name, loss)


def test_training_with_one(run_here) -> None:
    by_path = ("loss=custom", "loss.target=torch.nn.functional:multi_margin_loss")
    result = run_here(*by_path, "loss.options.margin=0.5", "trainer.max_epochs=5", "logger=csv")
    assert result.metrics["test/acc"] > 0.8
    assert result.parity["agree"]
