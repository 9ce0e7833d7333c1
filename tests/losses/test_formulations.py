"""Three formulations, one function: the subject's figures, identities, and where one way breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equiloss.losses.formulations import cross_entropy, log_softmax_nll, softmax_nll
from equiloss.parity import oracle

Loss = Callable[..., Tensor]

FORMULATIONS = (softmax_nll, log_softmax_nll, cross_entropy)
each_formulation = pytest.mark.parametrize("loss", FORMULATIONS)
each_stable_formulation = pytest.mark.parametrize("loss", [log_softmax_nll, cross_entropy])

# Logits and figures of the subject (docs: "Softmax and cross-entropy"), as printed.
LOGITS = torch.tensor(
    [
        [-0.7514, 1.2616, -0.4232, 1.3868, 1.2298],
        [1.5341, -0.4240, 0.0112, -0.5188, 0.1129],
        [-2.6143, 0.1532, 0.0868, -0.8231, 0.7698],
    ]
)
TARGETS = torch.tensor([3, 0, 1])
PROBABILITIES = torch.tensor(
    [
        [0.0390, 0.2923, 0.0542, 0.3313, 0.2832],
        [0.5784, 0.0816, 0.1261, 0.0742, 0.1396],
        [0.0149, 0.2365, 0.2213, 0.0891, 0.4382],
    ]
)
LOGS = torch.tensor(
    [
        [-3.2429, -1.2300, -2.9147, -1.1048, -1.2618],
        [-0.5476, -2.5056, -2.0705, -2.6004, -1.9687],
        [-4.2092, -1.4417, -1.5081, -2.4180, -0.8251],
    ]
)
# Half a unit in the fourth decimal, from printing a figure; log-softmax moves by at most twice
# what its logits move, and they are printed to four decimals as well.
PRINTED = 0.5e-4
PRINTED_LOG = 3 * PRINTED


def gradient(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Gradient of the sum of the losses with respect to the logits [N, C]."""
    logits = logits.detach().requires_grad_()
    (result,) = torch.autograd.grad(loss(logits, target, **options).sum(), logits)
    return result


def rounding(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """How far two evaluations of one function may lie apart [N]: each within its bound."""
    return 2 * oracle.cross_entropy(logits, target, **options).bound


class TestFiguresOfTheSubject:
    def test_softmax_by_hand_is_that_of_torch(self):
        x = torch.tensor([2.0, 1.0, 0.1])
        by_hand = x.exp() / x.exp().sum()
        expected = torch.tensor([0.65900114, 0.24243297, 0.09856589])
        # Values below 1 in float32, rounded once or twice.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(by_hand, expected, rtol=0, atol=eps)
        torch.testing.assert_close(torch.softmax(x, -1), expected, rtol=0, atol=eps)

    def test_softmax_amplifies_differences(self):
        p = torch.softmax(torch.tensor([-9.0, 5.0, 10.0], dtype=torch.float64), -1)
        assert [f"{value:.4e}" for value in p] == ["5.5653e-09", "6.6929e-03", "9.9331e-01"]

    def test_softmax_is_a_distribution(self):
        torch.testing.assert_close(
            torch.softmax(LOGITS, -1), PROBABILITIES, rtol=0, atol=2 * PRINTED
        )
        # Five values below 1, each rounded once.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            torch.softmax(LOGITS, -1).sum(-1), torch.ones(3), rtol=0, atol=5 * eps
        )

    def test_logarithms(self):
        torch.testing.assert_close(F.log_softmax(LOGITS, -1), LOGS, rtol=0, atol=PRINTED_LOG)
        torch.testing.assert_close(torch.softmax(LOGITS, -1).log(), LOGS, rtol=0, atol=PRINTED_LOG)

    @each_formulation
    def test_mean_over_the_rows(self, loss):
        assert f"{loss(LOGITS, TARGETS).mean():.4f}" == "1.0313"
        # From the unrounded logits of the subject the last digit is one more: 1.0314.
        assert loss(LOGITS, TARGETS).mean().item() == pytest.approx(1.0314, abs=PRINTED_LOG)

    @each_formulation
    def test_only_the_true_class_is_left_of_a_one_hot_sum(self, loss):
        expected = -LOGS[torch.arange(3), TARGETS]
        torch.testing.assert_close(loss(LOGITS, TARGETS), expected, rtol=0, atol=PRINTED_LOG)

    @each_formulation
    def test_the_logarithm_amplifies_what_softmax_squashes(self, loss):
        """0.999 and 0.99 differ by 0.009, and by a factor of ten in confidence."""
        p = torch.tensor([[0.999, 0.001], [0.99, 0.01]], dtype=torch.float64)
        sure, less_sure = loss(p.log(), torch.tensor([0, 0])).tolist()
        assert less_sure / sure == pytest.approx(10, rel=0.01)  # -log p = (1 - p) + O((1 - p)²)
        odds = (p[:, 0] / p[:, 1]).tolist()
        assert odds[0] / odds[1] == pytest.approx(10, rel=0.01)  # 999 to 1 against 99 to 1

    @each_formulation
    def test_gradient_is_softmax_minus_one_hot(self, loss):
        expected = torch.softmax(LOGITS, -1) - F.one_hot(TARGETS, 5)
        atol = rounding(LOGITS, TARGETS).max().item()
        torch.testing.assert_close(gradient(loss, LOGITS, TARGETS), expected, rtol=0, atol=atol)

    def test_sigmoid_alternative_is_binary_cross_entropy_on_each_output(self):
        """Binary cross-entropy of one output is cross-entropy of the two classes (0, x)."""
        labels = F.one_hot(TARGETS, 5)
        binary = F.binary_cross_entropy_with_logits(LOGITS, labels.float(), reduction="none")
        pairs = torch.stack([torch.zeros_like(LOGITS), LOGITS], dim=-1).flatten(0, 1)  # [15, 2]
        atol = rounding(pairs, labels.flatten()).max().item()
        for loss in FORMULATIONS:
            torch.testing.assert_close(
                loss(pairs, labels.flatten()), binary.flatten(), rtol=0, atol=atol
            )


class Calls(TorchFunctionMode):
    """Records which of the functions that the formulations differ by are called."""

    WATCHED = frozenset({"softmax", "log", "log_softmax", "nll_loss", "cross_entropy"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.WATCHED:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss", "calls"),
    [
        (softmax_nll, ["softmax", "log", "nll_loss"]),
        (log_softmax_nll, ["log_softmax", "nll_loss"]),
        (cross_entropy, ["cross_entropy"]),
    ],
)
def test_each_formulation_is_written_as_its_name_says(loss, calls, label_smoothing):
    with Calls() as mode:
        loss(LOGITS, TARGETS, label_smoothing=label_smoothing)
    assert mode.seen == calls


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits [N, C] whose softmax stays normal in float32, classes [N] and options."""
    rows, classes = draw(st.integers(0, 6)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    # Multiples of 1/64, so that a shift by an integer is exact; D <= 80 + log(6) < 87.3.
    largest = 64 * draw(st.sampled_from([0, 1, 10, 40]))
    logits = torch.randint(-largest, largest + 1, (rows, classes), generator=generator) / 64
    target = torch.randint(-1, classes, (rows,), generator=generator)
    weight = torch.randint(0, 32, (classes,), generator=generator) / 8
    options = {
        "weight": weight if draw(st.booleans()) else None,
        "ignore_index": -1,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    return logits, target, options


identity = settings(deadline=None, derandomize=True, max_examples=20)


def assert_same(got: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs()
    per_row = tolerance.view(-1, *[1] * (error.ndim - 1))  # also for a gradient [N, C]
    assert (error <= per_row).all(), f"off by {error.max()}, allowed {tolerance.tolist()}"


@each_formulation
class TestIdentities:
    @identity
    @given(problem=problems())
    def test_it_is_the_function_that_the_oracle_defines(self, loss, problem):
        logits, target, options = problem
        exact = oracle.cross_entropy(logits, target, **options)
        assert_same(loss(logits, target, **options).double(), exact.losses, exact.bound)
        slope = gradient(loss, logits, target, **options).double()
        ignored = target == -1
        assert_same(slope[~ignored], exact.gradient[~ignored], exact.bound[~ignored])
        assert not slope[ignored].any()

    @identity
    @given(problem=problems())
    def test_a_class_equals_its_one_hot_distribution(self, loss, problem):
        logits, target, options = problem
        kept = target != -1
        logits, target = logits[kept], target[kept]
        one_hot = F.one_hot(target, logits.shape[1]).float()
        tolerance = rounding(logits, target, **options)
        assert_same(loss(logits, one_hot, **options), loss(logits, target, **options), tolerance)

    @identity
    @given(problem=problems(), epsilon=st.floats(0, 1, width=32))
    def test_smoothing_is_a_smoothed_distribution(self, loss, problem, epsilon):
        logits, target, options = problem
        kept = target != -1
        logits, target, weight = logits[kept], target[kept], options["weight"]
        classes = logits.shape[1]
        smoothed = (1 - epsilon) * F.one_hot(target, classes) + epsilon / classes
        tolerance = rounding(logits, target, weight=weight, label_smoothing=epsilon)
        assert_same(
            loss(logits, target, weight=weight, label_smoothing=epsilon),
            loss(logits, smoothed, weight=weight),
            tolerance,
        )

    @identity
    @given(problem=problems())
    def test_no_smoothing_is_the_plain_negative_log_likelihood(self, loss, problem):
        logits, target, _ = problem
        kept = target != -1
        tolerance = rounding(logits, target, ignore_index=-1)[kept]
        plain = -F.log_softmax(logits[kept], -1).gather(1, target[kept].unsqueeze(1)).squeeze(1)
        got = loss(logits, target, ignore_index=-1, label_smoothing=0.0)
        assert_same(got[kept], plain, tolerance)

    @identity
    @given(problem=problems())
    def test_unit_weights_equal_no_weights(self, loss, problem):
        logits, target, options = problem
        ones = {**options, "weight": torch.ones(logits.shape[1])}
        none = {**options, "weight": None}
        assert_same(
            loss(logits, target, **ones),
            loss(logits, target, **none),
            rounding(logits, target, **none),
        )

    @identity
    @given(problem=problems(), data=st.data())
    def test_rows_do_not_know_each_other(self, loss, problem, data):
        """The losses of some rows, in any order, are those rows of the losses."""
        logits, target, options = problem
        order = torch.tensor(data.draw(st.permutations(range(len(target)))), dtype=torch.int64)
        some = order[: data.draw(st.integers(0, len(order)))]
        assert_same(
            loss(logits[some], target[some], **options),
            loss(logits, target, **options)[some],
            # Vectorised and scalar loops over a row may round differently.
            rounding(logits, target, **options)[some],
        )

    @identity
    @given(problem=problems(), shift=st.integers(-1000, 1000))
    def test_a_shift_of_all_logits_changes_nothing(self, loss, problem, shift):
        logits, target, options = problem
        assert torch.equal(logits + shift - shift, logits)  # the shift itself does not round
        # x - max(x) is exact for these numbers; a formulation without that subtraction would
        # round by eps · |shift| instead.
        assert_same(
            loss(logits + shift, target, **options),
            loss(logits, target, **options),
            rounding(logits, target, **options),
        )

    def test_class_weights_weigh_their_class(self, loss):
        weight = torch.tensor([1.0, 0.0, 3.0, 2.0, 0.5])
        expected = weight[TARGETS] * loss(LOGITS, TARGETS)
        assert_same(
            loss(LOGITS, TARGETS, weight=weight),
            expected,
            rounding(LOGITS, TARGETS, weight=weight),
        )

    def test_no_rows(self, loss):
        assert loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
        assert loss(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


def row(gap: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two classes, the second one `gap` above the first."""
    return torch.tensor([[0.0, gap]], dtype=dtype)


WRONG, RIGHT = torch.tensor([0]), torch.tensor([1])


class TestLargeLogits:
    """Mathematically softmax is never 0; in floating point it is."""

    @pytest.mark.parametrize(
        ("dtype", "largest"), [(torch.float16, 9.7), (torch.float32, 87.3), (torch.float64, 708.4)]
    )
    def test_domain_ends_where_softmax_leaves_the_normal_numbers(self, dtype, largest):
        domain = softmax_nll.max_logit_range(dtype)
        assert domain == pytest.approx(largest, abs=0.05)  # printed to one decimal
        assert math.exp(-domain) == pytest.approx(torch.finfo(dtype).tiny, rel=1e-12)

    # Gaps of two classes, by type: within the domain; where 1/p overflows; where p is 0.
    # p = exp(-gap) is a normal number up to 87.3 (708.4), 1/p is finite up to 88.7 (709.8), and p
    # is at least half the smallest subnormal up to 103.97 (745.1).
    BREAKS = (
        (torch.float32, 87.2, (88.8, 95.0), 104.0),
        (torch.float64, 708.0, (709.9, 740.0), 746.0),
    )

    @pytest.mark.parametrize(("dtype", "inside", "beyond", "zero"), BREAKS)
    def test_softmax_nll_is_sound_within_its_domain(self, dtype, inside, beyond, zero):
        logits = row(inside, dtype)
        assert softmax_nll(logits, WRONG).item() == pytest.approx(inside, rel=1e-6)
        assert gradient(softmax_nll, logits, WRONG).tolist() == [[-1, 1]]

    @pytest.mark.parametrize(("dtype", "inside", "beyond", "zero"), BREAKS)
    def test_its_gradient_breaks_while_its_loss_is_still_right(self, dtype, inside, beyond, zero):
        for gap in beyond:
            # Subnormal probabilities have few digits left, and their logarithm errs at most by
            # log(3/2), the relative rounding of the very smallest.
            assert softmax_nll(row(gap, dtype), WRONG).item() == pytest.approx(gap, abs=0.41)
            assert not gradient(softmax_nll, row(gap, dtype), WRONG).isfinite().all()
            # A row that is right by as much is still fine.
            slope = gradient(softmax_nll, row(gap, dtype), RIGHT)
            torch.testing.assert_close(slope, torch.zeros_like(slope))

    @pytest.mark.parametrize(("dtype", "inside", "beyond", "zero"), BREAKS)
    def test_then_its_loss_is_infinite_and_right_rows_have_no_gradient(
        self, dtype, inside, beyond, zero
    ):
        assert softmax_nll(row(zero, dtype), WRONG).item() == math.inf
        assert softmax_nll(row(zero, dtype), RIGHT).item() == 0
        assert gradient(softmax_nll, row(zero, dtype), RIGHT).isnan().all()

    @each_stable_formulation
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("gap", [88.8, 95.0, 104.0, 746.0, 1e4])
    def test_the_others_are_sound_everywhere(self, loss, gap, dtype):
        logits = row(gap, dtype)
        # The loss is the gap as this dtype stores it: log(1 + exp(-gap)) is below its precision.
        assert loss(logits, WRONG).item() == logits[0, 1].item()
        assert gradient(loss, logits, WRONG).tolist() == [[-1, 1]]
        assert loss(logits, RIGHT).item() == 0
        assert gradient(loss, logits, RIGHT).isfinite().all()

    @each_stable_formulation
    def test_the_others_are_sound_everywhere_with_smoothing_and_weights(self, loss):
        options = {"weight": torch.tensor([1.0, 3.0]), "label_smoothing": 0.1}
        exact = oracle.cross_entropy(row(1e4), WRONG, **options)
        assert_same(loss(row(1e4), WRONG, **options).double(), exact.losses, exact.bound)
        slope = gradient(loss, row(1e4), WRONG, **options).double()
        assert_same(slope, exact.gradient, exact.bound)

    def test_nothing_is_hidden_behind_an_epsilon(self):
        """A clamp would give the worst samples a gradient of 0: they have one of 1, or none."""
        for gap in torch.arange(0, 120, 0.5).tolist():
            slope = gradient(softmax_nll, row(gap), WRONG)
            assert slope[0, 1].item() >= 0.49 or not slope.isfinite().all()
