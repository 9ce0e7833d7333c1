"""The oracle: held to exact arithmetic, and the formulations held to its bound."""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equiloss.losses import Criterion
from equiloss.losses.formulations import cross_entropy, log_softmax_nll, softmax_nll
from equiloss.parity import oracle

FORMULATIONS = (softmax_nll, log_softmax_nll, cross_entropy)
IGNORED = -100


def case(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits with gaps of up to 80, targets of each kind and options, all by the seed's number.

    Seeds that differ by 24 have the same combination of options.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, classes = 4, int(torch.randint(2, 12, (), generator=generator))
    gap = (0.01, 1.0, 20.0, 80.0)[seed % 4]
    logits = (gap * torch.rand(rows, classes, dtype=dtype, generator=generator)) + (seed % 7) - 3
    soft, weighted = seed // 4 % 2 == 0, seed // 8 % 2 == 0
    if soft:
        target = (5 * torch.randn(rows, classes, dtype=dtype, generator=generator)).softmax(-1)
    else:
        target = torch.randint(classes, (rows,), generator=generator)
        target[0] = IGNORED
    return (
        logits,
        target,
        {
            "weight": 4 * torch.rand(classes, dtype=dtype, generator=generator)
            if weighted
            else None,
            "label_smoothing": (0.0, 0.1, 1.0)[seed // 16 % 3],
        },
    )


CASES = range(192)


def exact(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> tuple[list[Decimal], list[list[Decimal]], Decimal]:
    """Losses, gradient and mass from the definition, in decimal arithmetic of 60 digits.

    t' = (1 - ε) t + ε / C        loss = -sum_c w_c t'_c log p_c
    """
    with localcontext(prec=60):
        classes = logits.shape[1]
        epsilon = Decimal(label_smoothing)
        w = [Decimal(1)] * classes if weight is None else [Decimal(v) for v in weight.tolist()]
        losses, gradient, mass = [], [], Decimal(0)
        for x, y in zip(logits.tolist(), target.tolist(), strict=True):
            if y == IGNORED:
                losses.append(Decimal(0))
                gradient.append([Decimal(0)] * classes)
                continue
            if isinstance(y, list):
                t = [Decimal(v) for v in y]
                mass += 1
            else:
                t = [Decimal(int(c == y)) for c in range(classes)]
                mass += w[y]
            powers = [Decimal(v).exp() for v in x]
            p = [power / sum(powers) for power in powers]
            a = [w[c] * ((1 - epsilon) * t[c] + epsilon / classes) for c in range(classes)]
            losses.append(-sum(a[c] * p[c].ln() for c in range(classes)))
            gradient.append([sum(a) * p[c] - a[c] for c in range(classes)])
        return losses, gradient, mass


@functools.cache
def reference(seed: int, dtype: torch.dtype) -> tuple[list[Decimal], list[list[Decimal]], Decimal]:
    logits, target, options = case(seed, dtype)
    return exact(logits, target, **options)


def errors(got: Tensor, expected: list[Decimal]) -> list[float]:
    return [
        float(abs(Decimal(g) - e)) for g, e in zip(got.double().tolist(), expected, strict=True)
    ]


def worst_ratio(
    losses: Tensor, gradient: Tensor, bound: Tensor, seed: int, dtype: torch.dtype
) -> float:
    """Largest error over its row's bound; where the bound is 0, the error must be."""
    exact_losses, exact_gradient, _ = reference(seed, dtype)
    ratios = []
    for row, limit in enumerate(bound.tolist()):
        off = errors(losses[row : row + 1], exact_losses[row : row + 1])
        off += errors(gradient[row], exact_gradient[row])
        if limit == 0:
            assert max(off) == 0
        else:
            ratios.append(max(off) / limit)
    return max(ratios, default=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_definition_to_the_last_digits_of_float64(dtype):
    """Within the bound that it claims for float64 logits, which allows for both sides' rounding."""
    worst = 0.0
    for seed in CASES:
        logits, target, options = case(seed, dtype)
        got = oracle.cross_entropy(logits, target, **options)
        assert got.losses.dtype == got.gradient.dtype == torch.float64
        eps = torch.finfo(torch.float64).eps
        bound = got.bound / torch.finfo(dtype).eps * eps / (2 if dtype == torch.float64 else 1)
        worst = max(worst, worst_ratio(got.losses, got.gradient, bound, seed, dtype))
        # A float64 sum of a few positive numbers.
        assert float(got.mass) == pytest.approx(float(reference(seed, dtype)[2]), rel=1e-15)
    assert worst < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", FORMULATIONS)
def test_rounding_of_the_formulations_stays_within_the_bound(loss, dtype):
    """Against exact arithmetic, so that the oracle's own rounding hides nothing."""
    worst = 0.0
    for seed in CASES:
        logits, target, options = case(seed, dtype)
        logits.requires_grad_()
        losses = loss(logits, target, **options)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        bound = oracle.cross_entropy(logits, target, **options).bound
        worst = max(worst, worst_ratio(losses.detach(), gradient, bound, seed, dtype))
    assert worst < 1
    # Not so wide that a mistake would hide in it: rounding fills a good part of the bound, and
    # twice as much for float32, whose bound is not doubled.
    assert worst > (0.1 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"label_smoothing": 0.101}, id="ε off by 1 %"),
        pytest.param({"weight": [1.0, 2.0, 3.03]}, id="a weight off by 1 %"),
        pytest.param({"weight": None}, id="weights forgotten"),
    ],
)
def test_the_control_a_mistake_of_one_percent_is_far_outside_the_bound(mistake):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=generator)
    target = torch.arange(12) % 3
    right = {"weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1}
    wrong = Criterion("cross_entropy", **{**right, **mistake}).per_sample(logits, target)
    expected = oracle.cross_entropy(
        logits, target, weight=torch.tensor(right["weight"]), label_smoothing=0.1
    )
    assert ((wrong - expected.losses).abs() / expected.bound).max() > 100


class NoneOf(TorchFunctionMode):
    """Fails on a call of the functions that the oracle is there to check."""

    FORBIDDEN = frozenset({"softmax", "log_softmax", "nll_loss", "cross_entropy", "logsumexp"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in self.FORBIDDEN, f"{func.__name__} was called"
        return func(*args, **(kwargs or {}))


def test_nothing_is_compared_with_itself():
    for seed in range(24):
        logits, target, options = case(seed, torch.float32)
        with NoneOf():
            oracle.cross_entropy(logits, target, **options)
    with NoneOf(), pytest.raises(AssertionError, match="log_softmax was called"):
        torch.nn.functional.log_softmax(torch.zeros(2), 0)


def test_spread_is_the_range_that_rounding_grows_with():
    spread = oracle.cross_entropy(torch.tensor([[3.0, 0.0, 80.0]]), torch.tensor([0])).spread
    # logsumexp is 80 and the smallest logit 0: exact in float64 but for e-77.
    assert spread.tolist() == [80]


def test_ignored_rows_are_nothing_whatever_their_logits():
    logits = torch.tensor([[float("nan"), 1.0], [1.0, 2.0]])
    got = oracle.cross_entropy(logits, torch.tensor([IGNORED, 1]), label_smoothing=0.1)
    alone = oracle.cross_entropy(logits[1:], torch.tensor([1]), label_smoothing=0.1)
    assert got.losses.tolist() == [0, alone.losses.item()]
    assert got.gradient[0].tolist() == [0, 0]
    assert got.bound[0] == 0
    assert got.mass == alone.mass == 1


@pytest.mark.parametrize("ignore_index", [1, None])
def test_any_class_or_none_can_be_ignored(ignore_index):
    got = oracle.cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), ignore_index=ignore_index)
    assert got.mass == (2 if ignore_index is None else 1)
    assert (got.losses > 0).tolist() == [True, ignore_index is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_were_rounded_are_smoothed_as_pytorch_smooths(dtype):
    """t' = (1 - ε) t + ε / C also where a distribution sums to 1 only within its type."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 1000, generator=generator)
    target = (4 * torch.randn(20, 1000, generator=generator)).softmax(-1)
    target = (target * (1 + 5e-5)).to(dtype)  # within the 1,000 roundings that are accepted
    losses = Criterion("cross_entropy", label_smoothing=0.1).per_sample(logits, target)
    exact = oracle.cross_entropy(logits, target, label_smoothing=0.1)
    assert ((losses - exact.losses).abs() <= exact.bound).all()


def test_no_rows():
    got = oracle.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert got.losses.shape == got.bound.shape == (0,)
    assert got.gradient.shape == (0, 3)
    assert got.mass == 0
