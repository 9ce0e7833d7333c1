"""The bi-tempered logistic loss against an oracle that finds its normaliser by bisection."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.shelf.bi_tempered import bi_tempered, log_tempered_softmax

TEMPERATURES = [
    (0.8, 1.2),
    (0.0, 4.0),
    (0.2, 2.0),
    (1.0, 1.3),
    (0.9, 1.0),
    (1.0, 5.0),
    (0.5, 0.8),
    (0.5, 0.5),
    (0.0, 0.1),
    (0.999, 1.001),
    (1 - 1e-9, 1 + 1e-9),
]
each_pair = pytest.mark.parametrize(("t1", "t2"), TEMPERATURES)


def log_t(u: float, t: float) -> float:
    return math.log(u) if t == 1 else (u ** (1 - t) - 1) / (1 - t)


def log_exp_t(u: float, t: float) -> float:
    """The usual logarithm of exp_t(u), which holds on where exp_t(u) underflows."""
    if t == 1:
        return u
    return math.log1p((1 - t) * u) / (1 - t) if (1 - t) * u > -1 else -math.inf


def log_probabilities(logits: list[float], t: float) -> list[float]:
    """log exp_t(x - λ), with λ bisected until the sum of exp_t is 1: the definition alone."""
    low = max(logits)
    high = low - log_t(1 / len(logits), t)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(math.exp(log_exp_t(x - middle, t)) for x in logits) > 1:
            low = middle
        else:
            high = middle
    return [log_exp_t(x - high, t) for x in logits]


def oracle(logits: list[float], target: list[float], t1: float, t2: float) -> float:
    """The divergence as the paper writes it, with 0 log_t 0 = 0."""
    loss = 0.0
    for y, log_p in zip(target, log_probabilities(logits, t2), strict=True):
        p = math.exp(log_p)
        if y > 0:
            loss += y * (log_t(y, t1) - log_t(p, t1))
        loss -= (y ** (2 - t1) - p ** (2 - t1)) / (2 - t1)
    return loss


def problem(scale: float, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(classes)
    return scale * torch.randn(8, classes, generator=generator, dtype=dtype)


def gradient(logits: Tensor, target: Tensor, t1: float, t2: float) -> Tensor:
    logits = logits.detach().requires_grad_()
    (result,) = torch.autograd.grad(bi_tempered(logits, target, t1=t1, t2=t2).sum(), logits)
    return result


# The oracle's powers u^(1 - t) - 1 cancel as t approaches 1, by 1e-16 / (1 - t).
CANCELS = {(0.999, 1.001): 1e-12, (1 - 1e-9, 1 + 1e-9): 1e-6}


@each_pair
@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("classes", [2, 40])
class TestOracle:
    def test_classes(self, t1, t2, scale, classes):
        logits, target = problem(scale, classes), torch.arange(8) % classes
        one_hot = F.one_hot(target, classes).tolist()
        expected = [oracle(x, y, t1, t2) for x, y in zip(logits.tolist(), one_hot, strict=True)]
        got = bi_tempered(logits, target, t1=t1, t2=t2)
        # Otherwise roundings of 1e-16 over some classes, in powers up to 1 / 0.1.
        tolerance = CANCELS.get((t1, t2), 1e-13)
        assert got.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)

    def test_probabilities(self, t1, t2, scale, classes):
        logits = problem(scale, classes)
        target = problem(2.0, classes + 1)[:, :classes].softmax(-1)
        pairs = zip(logits.tolist(), target.tolist(), strict=True)
        expected = [oracle(x, y, t1, t2) for x, y in pairs]
        got = bi_tempered(logits, target, t1=t1, t2=t2)
        tolerance = CANCELS.get((t1, t2), 1e-13)
        assert got.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


class TestIdentities:
    def test_both_temperatures_1_are_cross_entropy(self):
        logits, target = problem(5.0, 6), torch.arange(8) % 6
        got = bi_tempered(logits, target, t1=1.0, t2=1.0)
        assert torch.equal(got, F.cross_entropy(logits, target, reduction="none"))

    def test_with_distributions_they_are_the_divergence_from_the_target(self):
        logits, target = problem(5.0, 6), problem(1.0, 6).roll(1, 0).softmax(-1)
        entropy = -(target * target.log()).sum(-1)
        expected = F.cross_entropy(logits, target, reduction="none") - entropy
        got = bi_tempered(logits, target, t1=1.0, t2=1.0)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)  # sums of six terms

    @pytest.mark.parametrize("apart", [1e-4, 1e-8, 1e-12])
    def test_temperatures_near_1_are_near_it(self, apart):
        logits, target = problem(1.0, 6), torch.arange(8) % 6
        got = bi_tempered(logits, target, t1=1 - apart, t2=1 + apart)
        expected = F.cross_entropy(logits, target, reduction="none")
        # Derivatives with respect to t1 and t2 are of the order of the squared loss.
        assert ((got - expected).abs() <= apart * (1 + expected) ** 2 + 1e-14).all()

    @pytest.mark.parametrize("t", [0.5, 0.9, 1.0])
    def test_equal_temperatures_match(self, t):
        """The loss that matches its softmax has the gradient p - t."""
        logits, target = problem(0.1, 5), torch.arange(8) % 5  # every p above 0
        p = log_tempered_softmax(logits, t).exp()
        expected = p - F.one_hot(target, 5)
        torch.testing.assert_close(gradient(logits, target, t, t), expected, rtol=0, atol=1e-14)

    @each_pair
    def test_it_is_0_where_the_prediction_is_the_target(self, t1, t2):
        logits = problem(0.1, 5)
        target = log_tempered_softmax(logits, t2).exp()
        got = bi_tempered(logits, target, t1=t1, t2=t2)
        torch.testing.assert_close(got, torch.zeros(8).double(), rtol=0, atol=1e-14)


@each_pair
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestAtAnyScale:
    def test_probabilities_sum_to_1(self, t1, t2, scale, dtype):
        logits = problem(scale, 40, dtype)
        # A logit near the shift is rounded by eps · scale, and t = 0.1 has the steepest exp_t.
        steep = scale if t2 < 1 else 1
        total = log_tempered_softmax(logits, t2).exp().sum(-1)
        assert ((total - 1).abs() <= 40 * steep * torch.finfo(dtype).eps).all()

    def test_gradient_is_the_closed_form(self, t1, t2, scale, dtype):
        logits, target = problem(scale, 5, dtype), torch.arange(8) % 5
        log_p = torch.tensor(
            [log_probabilities(x, t2) for x in logits.tolist()], dtype=torch.float64
        )
        p_minus_y = log_p.exp() - F.one_hot(target, 5)
        # d loss / d p_c = (p_c - y_c) p_c^-t1, and d p_c / d x_c = p_c^t2 for a fixed λ.
        pull = torch.where(log_p > -math.inf, p_minus_y * ((t2 - t1) * log_p).exp(), 0)
        escort = (t2 * log_p).softmax(-1)  # -d λ / d x_c
        expected = pull - escort * pull.sum(-1, keepdim=True)
        got = gradient(logits, target, t1, t2)
        steep = scale if t2 < 1 else 10
        assert ((got - expected).abs() <= 40 * steep * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize(("t1", "t2"), [(0.8, 1.2), (0.0, 4.0), (0.5, 0.5)])
def test_it_is_bounded_as_it_says(t1, t2):
    logits = torch.tensor([[0.0, 1e4], [0.0, 30.0]])
    losses = bi_tempered(logits, torch.tensor([0, 0]), t1=t1, t2=t2)
    assert (losses <= 1 / (1 - t1)).all()


def test_a_heavy_tail_leaves_the_worst_row_a_gradient():
    wrong = gradient(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), 0.8, 1.2)
    assert wrong[0, 0] < 0
    beyond = gradient(torch.tensor([[0.0, 1e4]]), torch.tensor([0]), 0.5, 0.8)
    assert not beyond.any()  # p = 0 exactly, for every logit near this one


def test_the_edge_of_the_support_has_a_slope():
    """1 + (1 - t) u is exactly 0 there, where a logarithm's slope would be infinite."""
    slope = gradient(torch.tensor([[0.0, -2.0]]), torch.tensor([0]), 0.5, 0.5)
    assert slope.tolist() == [[0, 0]]


@pytest.mark.parametrize("t", [0.1, 5.0])
def test_newton_arrives_with_very_many_classes(t):
    """Twenty thousand classes at t = 0.1 take all of its steps."""
    total = log_tempered_softmax(problem(0.1, 20_000)[:2], t).exp().sum(-1)
    # A sum of twenty thousand rounded terms.
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-13)
