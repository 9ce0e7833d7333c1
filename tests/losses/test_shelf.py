"""The shelf: laws that every built-in loss keeps, and the identities that each is known by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.errors import LossError
from equiloss.losses import Criterion, registry
from equiloss.losses.formulations import cross_entropy
from equiloss.losses.shelf.binary import sigmoid_bce
from equiloss.losses.shelf.focal import focal, poly1
from equiloss.losses.shelf.long_tail import balanced_softmax, ldam, logit_adjusted
from equiloss.losses.shelf.robust import generalized_cross_entropy, symmetric_cross_entropy
from support import Run

Loss = Callable[..., Tensor]

BUILT_IN = [
    name
    for name in registry.names()
    if registry.provider(name).source == "equiloss"
    and not registry.signature(name).wants_features  # those are held to their logits' losses
]
SOFT = [name for name in BUILT_IN if registry.signature(name).soft_targets]
EVERYWHERE = [name for name in BUILT_IN if registry.signature(name).max_logit_range is None]
# Other options than the defaults, where these would leave a branch untried.
OTHERS: dict[str, list[dict[str, float]]] = {
    "bi_tempered": [{"t1": 0.0, "t2": 4.0}, {"t1": 0.5, "t2": 0.8}, {"t1": 1.0, "t2": 1.0}],
    "cross_entropy": [{"z_loss": 0.1}],
    "focal": [{"gamma": 0.0}, {"gamma": 0.3}],
    "generalized_cross_entropy": [{"q": 0.0}, {"q": 1.0}],
    "ldam": [{"max_m": 2.0, "s": 30.0}],
    "logit_adjusted": [{"tau": 0.5}],
    "poly1": [{"epsilon": -1.0}],
    "symmetric_cross_entropy": [{"alpha": 2.0, "log_zero": -1.0}],
}
COUNTS = torch.tensor([50, 7, 1, 12])
WEIGHT = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
IGNORED = -100

LOGITS = 4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.tensor([3, 0, 2, 1, 1, 0])
# A few roundings of each of four classes; the largest loss here is about 100 nats.
ROUNDING = {"rtol": 1e-13, "atol": 1e-13}

assert_close = functools.partial(torch.testing.assert_close, **ROUNDING)


def variants(
    names: list[str], only: Callable[[str, dict[str, float]], bool] = lambda name, options: True
) -> pytest.MarkDecorator:
    """Each name with the default options, and with the others."""
    cases = [(name, options) for name in names for options in ({}, *OTHERS.get(name, ()))]
    cases = [case for case in cases if only(*case)]
    ids = ["-".join([n, *(f"{k}={v}" for k, v in options.items())]) for n, options in cases]
    return pytest.mark.parametrize(("name", "options"), cases, ids=ids)


def loss_of(name: str, options: dict[str, Any], counts: Tensor = COUNTS) -> Loss:
    takes_counts = "class_counts" in registry.signature(name).supported
    filled = {"class_counts": counts} if takes_counts else {}
    return functools.partial(registry.get(name), **options, **filled)


def gradient(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Gradient of the sum of the losses with respect to the logits [N, C]."""
    logits = logits.detach().requires_grad_()
    (result,) = torch.autograd.grad(loss(logits, target, **options).sum(), logits)
    return result


class TestLaws:
    @variants(BUILT_IN)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_value_for_each_row_in_the_dtype_of_the_logits(self, name, options, dtype):
        loss = loss_of(name, options)
        for rows in (len(TARGET), 1, 0):
            losses = loss(LOGITS[:rows].to(dtype), TARGET[:rows])
            assert losses.shape == (rows,)
            assert losses.dtype == dtype

    @variants(BUILT_IN)
    def test_rows_do_not_know_each_other(self, name, options):
        loss, some = loss_of(name, options), torch.tensor([4, 0, 3])
        assert_close(loss(LOGITS[some], TARGET[some]), loss(LOGITS, TARGET)[some])

    @variants(BUILT_IN)
    def test_ignored_rows_are_0_in_value_and_gradient(self, name, options):
        # As the criterion does: an ignored row's logits are 0 before the loss sees them.
        loss, target = loss_of(name, options), TARGET.clone()
        target[[0, 4]] = IGNORED
        logits = LOGITS.masked_fill((target == IGNORED).unsqueeze(-1), 0)
        losses = loss(logits, target, weight=WEIGHT)
        slope = gradient(loss, logits, target, weight=WEIGHT)
        assert not losses[[0, 4]].any()
        assert not slope[[0, 4]].any()
        kept = target != IGNORED
        assert_close(losses[kept], loss(logits[kept], target[kept], weight=WEIGHT))

    @variants(BUILT_IN)
    def test_a_weight_scales_the_rows_of_its_class(self, name, options):
        loss = loss_of(name, options)
        assert_close(loss(LOGITS, TARGET, weight=WEIGHT), WEIGHT[TARGET] * loss(LOGITS, TARGET))

    @variants(SOFT)
    def test_a_class_equals_its_one_hot_distribution(self, name, options):
        loss, one_hot = loss_of(name, options), F.one_hot(TARGET, 4).double()
        for weight in (None, WEIGHT):
            hard, soft = (loss(LOGITS, t, weight=weight) for t in (TARGET, one_hot))
            assert_close(soft, hard)

    @variants(BUILT_IN)
    def test_a_shift_of_all_logits_changes_nothing_unless_it_says_otherwise(self, name, options):
        loss = loss_of(name, options)
        moved = (loss(LOGITS + 3, TARGET) - loss(LOGITS, TARGET)).abs().max()
        if registry.signature(name).is_shift_invariant(options):
            assert moved < 1e-12  # x + 3 rounds, at most by 1e-15, and s is up to 30
        else:
            assert moved > 0.1

    @variants(BUILT_IN)
    def test_gradient_is_that_of_the_value(self, name, options):
        loss, target = loss_of(name, options), TARGET[:3]
        logits = LOGITS[:3].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, target, weight=WEIGHT), logits)
        assert torch.autograd.gradgradcheck(lambda x: loss(x, target), logits)
        if name in SOFT:
            mixed = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 0.5, 0.5, 0], [0, 0, 1, 0]]).double()
            assert torch.autograd.gradcheck(lambda x: loss(x, mixed, weight=WEIGHT), logits)

    @variants(EVERYWHERE)
    def test_it_is_finite_at_extreme_logits(self, name, options):
        loss = loss_of(name, options)
        rows = [
            [0, 0, 0, 0],
            [1e4, 1e4, 1e4, 1e4],
            [1e4, 0, 0, 0],
            [-1e4, 1e4, 0, 1],
            [88, 0, 0, 0],
        ]
        logits = torch.tensor(rows, dtype=torch.float32)
        for label in range(4):
            target = torch.full((len(rows),), label)
            assert loss(logits, target).isfinite().all()
            assert gradient(loss, logits, target).isfinite().all()

    @variants(BUILT_IN, lambda name, options: registry.signature(name).is_shift_invariant(options))
    def test_a_single_class_is_always_right(self, name, options):
        loss = loss_of(name, options, counts=COUNTS[:1])
        logits, target = torch.tensor([[0.0], [1e4]]), torch.tensor([0, 0])
        assert not loss(logits, target).any()
        assert not gradient(loss, logits, target).any()

    @variants(BUILT_IN)
    def test_rows_may_be_mapped_over(self, name, options):
        """vmap refuses whatever depends on values in Python, as a wait for a device would."""
        loss = loss_of(name, options)

        def one(logits: Tensor, target: Tensor) -> Tensor:
            return loss(logits[None], target[None], weight=WEIGHT)[0]

        slopes = torch.func.vmap(torch.func.grad(one))(LOGITS, TARGET)
        assert_close(slopes, gradient(loss, LOGITS, TARGET, weight=WEIGHT))


class TestCrossEntropyIsASpecialCase:
    """With these options each loss is cross-entropy, value and gradient."""

    EQUAL = torch.full((4,), 9)
    CASES = (
        pytest.param(focal, {"gamma": 0.0}, 1.0, id="focal, γ = 0"),
        pytest.param(poly1, {"epsilon": 0.0}, 1.0, id="poly1, ε = 0"),
        pytest.param(generalized_cross_entropy, {"q": 0.0}, 1.0, id="generalized, q = 0"),
        pytest.param(symmetric_cross_entropy, {"alpha": 0.3, "beta": 0.0}, 0.3, id="symmetric"),
        pytest.param(logit_adjusted, {"tau": 0.0, "class_counts": COUNTS}, 1.0, id="τ = 0"),
        pytest.param(logit_adjusted, {"tau": 2.0, "class_counts": EQUAL}, 1.0, id="equal counts"),
        pytest.param(balanced_softmax, {"class_counts": EQUAL}, 1.0, id="balanced, equal counts"),
        pytest.param(ldam, {"max_m": 0.0, "s": 1.0, "class_counts": COUNTS}, 1.0, id="no margin"),
        pytest.param(cross_entropy, {"z_loss": 0.0}, 1.0, id="no z-loss"),
    )

    @pytest.mark.parametrize(("loss", "options", "factor"), CASES)
    def test_value_and_gradient(self, loss, options, factor):
        for weight in (None, WEIGHT):
            expected = factor * F.cross_entropy(LOGITS, TARGET, weight=weight, reduction="none")
            assert_close(loss(LOGITS, TARGET, weight=weight, **options), expected)
            slope = factor * gradient(cross_entropy, LOGITS, TARGET, weight=weight)
            assert_close(gradient(loss, LOGITS, TARGET, weight=weight, **options), slope)

    @pytest.mark.parametrize(
        ("loss", "options", "factor"), [case for case in CASES if case.values[0] is not ldam]
    )
    def test_soft_targets(self, loss, options, factor):
        soft = (LOGITS.roll(1, 0) / 4).softmax(-1)
        expected = factor * F.cross_entropy(LOGITS, soft, weight=WEIGHT, reduction="none")
        assert_close(loss(LOGITS, soft, weight=WEIGHT, **options), expected)


P = LOGITS.softmax(-1)
P_TRUE = P.gather(1, TARGET.unsqueeze(1)).squeeze(1)


class TestFocal:
    @pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
    def test_it_is_the_formula_of_the_paper(self, gamma):
        expected = -((1 - P_TRUE) ** gamma) * P_TRUE.log()
        assert_close(focal(LOGITS, TARGET, gamma=gamma), expected)

    @pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("margin", [0.0, 1.0, 10.0, 30.0, 40.0])
    def test_sure_rows_keep_their_digits(self, gamma, margin):
        """1 - p is 9e-14 at a margin of 30 and no longer representable as 1 - p at 40."""
        logits = torch.tensor([[margin, 0.0]], dtype=torch.float64)
        others = math.exp(-margin) / (1 + math.exp(-margin))  # 1 - p
        # d/dm of -(1 - p)^γ log p, m being the margin: p' = p (1 - p).
        slope = -(others**gamma) * (gamma * (1 - others) * math.log1p(math.exp(-margin)) + others)
        got = gradient(focal, logits, torch.tensor([0]), gamma=gamma)[0, 0].item()
        # log p itself has a rounding of 1e-16 where it is smaller than that.
        assert got == pytest.approx(slope, rel=1e-12, abs=1e-15 * others**gamma)


class TestPoly1:
    @pytest.mark.parametrize("epsilon", [-1.0, 1.0, 5.0])
    def test_it_is_the_formula_of_the_paper(self, epsilon):
        expected = -P_TRUE.log() + epsilon * (1 - P_TRUE)
        assert_close(poly1(LOGITS, TARGET, epsilon=epsilon), expected)


class TestRobust:
    def test_q_of_1_is_the_mean_absolute_error(self):
        """|p - t| summed over the classes is 2 (1 - p_y); the paper counts half of it."""
        expected = (P - F.one_hot(TARGET, 4)).abs().sum(-1) / 2
        assert_close(generalized_cross_entropy(LOGITS, TARGET, q=1.0), expected)

    @pytest.mark.parametrize("q", [1e-3, 1e-6, 1e-9])
    def test_small_q_approaches_cross_entropy(self, q):
        nll = cross_entropy(LOGITS, TARGET)
        apart = (nll - generalized_cross_entropy(LOGITS, TARGET, q=q)).abs()
        # (1 - exp(-q l)) / q = l - q l² / 2 + …, an alternating series.
        assert (apart <= q * nll**2 / 2 + 1e-14).all()

    def test_symmetric_is_the_sum_of_both_directions(self):
        t = F.one_hot(TARGET, 4).double()
        log_t = torch.where(t > 0, 0.0, -4.0)  # log 1 and "log 0"
        expected = -(t * P.log()).sum(-1) - 2 * (P * log_t).sum(-1)
        assert_close(symmetric_cross_entropy(LOGITS, TARGET, alpha=1.0, beta=2.0), expected)

    def test_symmetric_with_distributions_floors_their_logarithm(self):
        t = torch.tensor([[0.5, 0.5 - 1e-9, 1e-9, 0.0]], dtype=torch.float64)
        log_t = torch.tensor([math.log(0.5), math.log(0.5 - 1e-9), -4.0, -4.0], dtype=torch.float64)
        got = symmetric_cross_entropy(LOGITS[:1], t, alpha=0.0, beta=1.0)
        assert_close(got, -(P[:1] * log_t).sum(-1))


class TestLongTail:
    def test_it_is_the_paper_balanced_softmax(self):
        weighed = COUNTS * LOGITS.exp()
        p = (weighed / weighed.sum(-1, keepdim=True)).gather(1, TARGET.unsqueeze(1)).squeeze(1)
        assert_close(balanced_softmax(LOGITS, TARGET, class_counts=COUNTS), -p.log())

    def test_balanced_softmax_is_logit_adjustment_with_the_prior_itself(self):
        options = {"class_counts": COUNTS, "weight": WEIGHT, "label_smoothing": 0.1}
        got = balanced_softmax(LOGITS, TARGET, **options)
        assert torch.equal(got, logit_adjusted(LOGITS, TARGET, tau=1.0, **options))

    def test_zero_logits_give_the_prior(self):
        expected = -(COUNTS.double() / COUNTS.sum()).log()
        got = balanced_softmax(torch.zeros(4, 4).double(), torch.arange(4), class_counts=COUNTS)
        assert_close(got, expected)

    def test_margins_fall_with_the_fourth_root_of_the_count(self):
        counts = torch.tensor([1, 16, 81, 256])
        margins = torch.tensor([0.6, 0.3, 0.2, 0.15], dtype=torch.float64)
        logits, target = LOGITS[:4], torch.arange(4)
        expected = F.cross_entropy(2 * (logits - margins.diag()), target, reduction="none")
        got = ldam(logits, target, class_counts=counts, max_m=0.6, s=2.0)
        assert_close(got, expected)

    @pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjusted", "ldam"])
    def test_a_class_without_training_rows_is_refused(self, name):
        with pytest.raises(LossError) as caught:
            Criterion(name, class_counts=[5, 3, 0, 1])
        assert str(caught.value) == (
            f"loss {name!r} is undefined: class 2 has 0 training samples and needs at least 1"
        )


class TestBinary:
    def test_it_is_pytorchs_summed_over_the_classes(self):
        labels = F.one_hot(TARGET, 4).double()
        expected = F.binary_cross_entropy_with_logits(LOGITS, labels, reduction="none").sum(-1)
        assert_close(sigmoid_bce(LOGITS, TARGET), expected)

    def test_its_gradient_is_sigmoid_minus_one_hot(self):
        expected = LOGITS.sigmoid() - F.one_hot(TARGET, 4)
        assert_close(gradient(sigmoid_bce, LOGITS, TARGET), expected)


class TestZLoss:
    def test_it_adds_the_squared_normaliser_times_the_rows_weight(self):
        lse = LOGITS.exp().sum(-1).log()
        plain = cross_entropy(LOGITS, TARGET, weight=WEIGHT)
        got = cross_entropy(LOGITS, TARGET, weight=WEIGHT, z_loss=0.1)
        assert_close(got, plain + 0.1 * WEIGHT[TARGET] * lse**2)
        soft = (LOGITS.roll(1, 0) / 4).softmax(-1)
        plain = cross_entropy(LOGITS, soft, weight=WEIGHT)
        got = cross_entropy(LOGITS, soft, weight=WEIGHT, z_loss=0.1)
        assert_close(got, plain + 0.1 * (soft @ WEIGHT) * lse**2)

    def test_its_gradient_is_2_z_lse_softmax(self):
        lse = LOGITS.exp().sum(-1, keepdim=True).log()
        plain = gradient(cross_entropy, LOGITS, TARGET)
        got = gradient(cross_entropy, LOGITS, TARGET, z_loss=0.1)
        assert_close(got, plain + 2 * 0.1 * lse * P)

    def test_without_it_the_bits_are_those_of_the_one_call(self):
        options = {"weight": WEIGHT.float(), "label_smoothing": 0.1}
        expected = F.cross_entropy(LOGITS.float(), TARGET, reduction="none", **options)
        assert torch.equal(cross_entropy(LOGITS.float(), TARGET, z_loss=0.0, **options), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal", {"gamma": -0.1}, r"loss\.gamma must be finite and at least 0, got -0\.1"),
        ("focal", {"gamma": math.nan}, r"loss\.gamma .* got nan"),
        ("poly1", {"epsilon": -1.1}, r"loss\.epsilon must be finite and at least -1, got -1\.1"),
        ("generalized_cross_entropy", {"q": 1.1}, r"loss\.q must lie in \[0, 1\], got 1\.1"),
        ("symmetric_cross_entropy", {"alpha": -1.0}, r"loss\.alpha must be finite"),
        ("symmetric_cross_entropy", {"beta": math.inf}, r"loss\.beta must be finite"),
        ("symmetric_cross_entropy", {"log_zero": 0.0}, r"loss\.log_zero .* below 0, got 0\.0"),
        ("logit_adjusted", {"tau": -1.0}, r"loss\.tau must be finite and at least 0"),
        ("ldam", {"max_m": -1.0}, r"loss\.max_m must be finite and at least 0"),
        ("ldam", {"s": 0.0}, r"loss\.s must be finite and above 0"),
        ("bi_tempered", {"t1": 1.1, "t2": 2.0}, r"loss\.t1 must lie in \[0, 1\], got 1\.1"),
        ("bi_tempered", {"t1": 0.8, "t2": 0.7}, r"loss\.t2 must lie in \[0\.8, 5\], got 0\.7"),
        ("bi_tempered", {"t1": 0.0, "t2": 0.05}, r"loss\.t2 must lie in \[0\.1, 5\], got 0\.05"),
        ("cross_entropy", {"z_loss": -1e-4}, r"loss\.z_loss must be finite and at least 0"),
    ],
)
def test_an_option_outside_its_range_is_refused(name, options, message):
    with pytest.raises(LossError, match=message):
        Criterion(name, **options, class_counts=COUNTS)(LOGITS, TARGET)


class TestRuns:
    @pytest.mark.parametrize(
        "loss", [("focal",), ("balanced_softmax",), ("bi_tempered", "loss.t2=1.3")], ids="-".join
    )
    def test_training_is_watched_over_by_the_three_formulations(self, loss, run_here: Run):
        result = run_here(f"loss={loss[0]}", *loss[1:], "debug=fast", "parity=strict")
        assert result.parity["agree"]
        assert {"softmax_nll", "log_softmax_nll", "cross_entropy"} <= result.parity.keys()

    def test_class_counts_are_those_of_the_training_set(self, run_here: Run):
        with pytest.raises(LossError, match=r"'balanced_softmax' is undefined: class \d has 0 "):
            run_here("loss=balanced_softmax", "data.max_samples=5")
