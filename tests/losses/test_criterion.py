"""The criterion: total over mass is PyTorch's mean, and what it refuses."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from equiloss.errors import DataError, LossError
from equiloss.losses import Criterion, reduction, registry
from equiloss.parity import oracle

FORMULATIONS = ("softmax_nll", "log_softmax_nll", "cross_entropy")
each_formulation = pytest.mark.parametrize("name", FORMULATIONS)

IGNORED = -100


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to be installed is no concern here, and looking for it takes milliseconds."""
    monkeypatch.setenv("EQUILOSS_DISABLE_PLUGINS", "1")


def mean_and_gradient(criterion: Criterion, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The reduced loss, and its gradient with respect to the logits."""
    logits = logits.detach().requires_grad_()
    loss = reduction.mean(*criterion(logits, target))
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def pytorch_mean_and_gradient(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


class TestSameNumberAsPyTorch:
    """Total / mass equals F.cross_entropy(reduction="mean") for every combination of options."""

    PRODUCT = tuple(
        pytest.param(*case, id="-".join(str(part).removeprefix("torch.") for part in case))
        for case in itertools.product(
            ("hard", "ignored", "soft"),
            ("weights", "no weights"),
            (0.0, 0.1),
            (torch.float32, torch.float64),
        )
    )

    @pytest.mark.parametrize(("targets", "weights", "label_smoothing", "dtype"), PRODUCT)
    @settings(deadline=None, derandomize=True, max_examples=8)
    @given(
        rows=st.integers(1, 8),
        classes=st.integers(2, 6),
        scale=st.sampled_from([0.0, 0.01, 1.0, 10.0, 40.0]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_value_and_gradient(
        self, targets, weights, label_smoothing, dtype, rows, classes, scale, seed
    ):
        generator = torch.Generator().manual_seed(seed)
        uniform = functools.partial(torch.rand, dtype=dtype, generator=generator)
        # Within the domain of softmax + log: D <= 80 + log(6) < 87.3.
        logits = scale * (2 * uniform(rows, classes) - 1)
        if targets == "soft":
            target = (10 * uniform(rows, classes)).softmax(-1)
        else:
            target = torch.randint(classes, (rows,), generator=generator)
        if targets == "ignored":
            target[1::2] = IGNORED
        weight = (8 * uniform(classes)).tolist() if weights == "weights" else None

        options = {"weight": weight, "label_smoothing": label_smoothing}
        tensors = options | {
            "weight": None if weight is None else torch.tensor(weight, dtype=dtype)
        }
        exact = oracle.cross_entropy(logits, target, **tensors)
        expected, expected_gradient = pytorch_mean_and_gradient(logits, target, **tensors)
        # Each side errs per row by at most the oracle's bound, and rounds two sums over the rows
        # and one quotient.
        eps = torch.finfo(dtype).eps
        summing = 2 * (rows + 1) * eps
        by_row = 2 * exact.bound / exact.mass + summing * exact.gradient.abs().amax(-1) / exact.mass
        overall = 2 * exact.bound.sum() / exact.mass + summing * exact.losses.sum() / exact.mass
        for name in FORMULATIONS:
            loss, gradient = mean_and_gradient(Criterion(name, **options), logits, target)
            assert loss.dtype == gradient.dtype == dtype
            assert abs(loss - expected) <= overall
            assert ((gradient - expected_gradient).abs() <= by_row.unsqueeze(-1)).all()

    @each_formulation
    def test_the_control_forgetting_a_weight_is_seen(self, name):
        """The comparison above has teeth: a wrong mass is far outside any rounding."""
        logits, target = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])
        weight = [1.0, 3.0]
        expected = F.cross_entropy(logits, target, weight=torch.tensor(weight))
        right = Criterion(name, weight=weight)(logits, target)
        assert right.mass == 4
        torch.testing.assert_close(right.total / right.mass, expected)
        assert abs(right.total / len(target) - expected) > 0.1


class TestMass:
    def test_hard_targets_count_their_weight_and_soft_targets_one_each(self):
        criterion = Criterion("cross_entropy", weight=[1.0, 3.0, 0.5])
        assert criterion.mass(torch.tensor([0, 1, 1, IGNORED, 2])) == 1 + 3 + 3 + 0.5
        assert criterion.mass(torch.full((5, 3), 1 / 3)) == 5
        assert Criterion("cross_entropy").mass(torch.tensor([0, 1, 1, IGNORED, 2])) == 4

    def test_it_needs_no_logits_and_adds_up_over_micro_batches(self):
        criterion = Criterion("cross_entropy", weight=[1.0, 3.0, 0.5])
        target = torch.tensor([0, 1, IGNORED, 2, 2, 1])
        parts = sum(criterion.mass(part) for part in target.split([1, 0, 3, 2]))
        assert parts == criterion.mass(target)

    @each_formulation
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize(
        ("target", "weight"),
        [
            pytest.param([IGNORED, IGNORED, IGNORED], None, id="all ignored"),
            pytest.param([IGNORED, IGNORED, IGNORED], [1.0, 2.0], id="all ignored, weights"),
            pytest.param([0, 0, IGNORED], [0.0, 2.0], id="all of weight 0"),
            pytest.param([], None, id="no rows"),
        ],
    )
    def test_without_mass_the_loss_is_0_with_exactly_zero_gradient(
        self, name, target, weight, label_smoothing
    ):
        target = torch.tensor(target, dtype=torch.int64)
        logits = torch.linspace(-3, 3, 2 * len(target)).view(-1, 2)
        criterion = Criterion(name, weight=weight, label_smoothing=label_smoothing)
        loss, gradient = mean_and_gradient(criterion, logits, target)
        assert criterion.mass(target) == 0
        assert loss.item() == 0
        assert gradient.tolist() == torch.zeros_like(logits).tolist()


class TestIgnoredRows:
    @each_formulation
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
    def test_they_contribute_exactly_nothing_whatever_their_logits(
        self, name, label_smoothing, bad
    ):
        logits = torch.tensor([[0.5, -1.0, 2.0], [bad, 0.0, bad], [1.0, 1.5, -0.5]])
        target = torch.tensor([2, IGNORED, 0])
        criterion = Criterion(name, weight=[1.0, 2.0, 3.0], label_smoothing=label_smoothing)
        assert criterion.per_sample(logits, target)[1].item() == 0
        loss, gradient = mean_and_gradient(criterion, logits, target)
        without, without_gradient = mean_and_gradient(criterion, logits[[0, 2]], target[[0, 2]])
        assert gradient[1].tolist() == [0, 0, 0]
        assert torch.equal(loss, without)
        assert torch.equal(gradient[[0, 2]], without_gradient)

    def test_they_are_nothing_also_where_the_loss_makes_something_of_them(self):
        def careless(logits, target, *, ignore_index: int = IGNORED):
            return 1 + logits.exp().sum(-1)

        criterion = Criterion(careless)
        logits = torch.full((2, 3), math.inf).requires_grad_()
        losses = criterion.per_sample(logits, torch.tensor([IGNORED, IGNORED]))
        losses.sum().backward()
        assert losses.tolist() == [0, 0]
        assert logits.grad.tolist() == [[0, 0, 0]] * 2

    @each_formulation
    @pytest.mark.parametrize("ignored_rows", [True, False])
    def test_what_is_known_of_all_targets_changes_no_bit(self, name, ignored_rows):
        logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        target = torch.tensor([0, 1, 2, IGNORED if ignored_rows else 1, 0, 1])
        plain, told = Criterion(name), Criterion(name)
        told.expect(ignored_rows=ignored_rows)
        for one, other in zip(plain(logits, target), told(logits, target), strict=True):
            assert torch.equal(one, other)

    def test_compiled_it_is_one_graph_that_looks_at_no_value(self):
        criterion = Criterion("cross_entropy")
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        for target in ([0, 1, 2, 0], [0, IGNORED, 2, IGNORED]):
            got, expected = (each(logits, torch.tensor(target)) for each in (compiled, criterion))
            assert got.mass == expected.mass
            torch.testing.assert_close(got.total, expected.total)

    def test_another_class_can_be_ignored(self):
        criterion = Criterion("cross_entropy", ignore_index=1)
        assert criterion.mass(torch.tensor([0, 1, 2])) == 2
        with pytest.raises(DataError, match="target 0 is -100"):
            criterion(torch.zeros(1, 3), torch.tensor([-100]))


class TestPrecision:
    @each_formulation
    @pytest.mark.parametrize(
        ("given", "computed"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_half_precision_is_promoted_and_float64_stays(self, name, given, computed):
        logits = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, 1.0]], dtype=given)
        target = torch.tensor([0, 2])
        criterion = Criterion(name, weight=[0.3, 0.7, 1.1], label_smoothing=0.1)
        result = criterion(logits, target)
        wide = criterion(logits.to(computed), target)
        assert result.total.dtype == result.mass.dtype == computed
        assert torch.equal(result.total, wide.total)
        assert torch.equal(result.mass, wide.mass)

    @each_formulation
    @pytest.mark.parametrize("soft", [False, True])
    def test_gradcheck(self, name, soft):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        target = torch.tensor([0, 2, IGNORED, 1])
        if soft:
            target = torch.randn(4, 3, dtype=torch.float64, generator=generator).softmax(-1)
        criterion = Criterion(name, weight=[0.5, 1.0, 2.0], label_smoothing=0.1)
        assert torch.autograd.gradcheck(lambda x: criterion.per_sample(x, target), logits)

    @each_formulation
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast_changes_nothing(self, name, dtype):
        generator = torch.Generator().manual_seed(0)
        logits, target = torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0])
        criterion = Criterion(name, label_smoothing=0.1)
        expected = mean_and_gradient(criterion, logits, target)
        with torch.autocast("cpu", dtype):
            # The control: autocast is on, and would have rounded.
            assert torch.mm(logits, logits.T).dtype == dtype
            loss, gradient = mean_and_gradient(criterion, logits, target)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])

    def test_converting_the_module_does_not_round_class_weights(self):
        criterion = Criterion("cross_entropy", weight=[0.1, 0.2, 0.3]).to(torch.bfloat16)
        assert criterion.weight(torch.float64, torch.device("cpu")).tolist() == [0.1, 0.2, 0.3]
        assert list(criterion.state_dict()) == []

    def test_soft_targets_of_another_type_are_converted(self):
        target = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
        result = Criterion("log_softmax_nll")(torch.zeros(1, 2), target)
        assert result.total.dtype == torch.float32
        assert result.total.item() == pytest.approx(math.log(2), rel=1e-7)


class TestWeights:
    def test_balanced_gives_each_class_the_same_mass(self):
        criterion = Criterion("cross_entropy", weight="balanced", class_counts=[1, 2, 5])
        by_class = [criterion.mass(torch.full((n,), c)) for c, n in enumerate([1, 2, 5])]
        assert [mass.item() for mass in by_class] == pytest.approx([8 / 3] * 3, rel=1e-6)

    @pytest.mark.parametrize(
        ("weight", "counts", "message"),
        [
            ("balanced", None, "'cross_entropy' with weight=balanced needs class_counts"),
            ("balanced", [3, 0, 2], "class 1 has no training sample"),
            ("equal", [1, 1], "must be null, 'balanced' or a list, got 'equal'"),
            ([1.0, -2.0], None, "finite, non-negative number per class; got -2.0"),
            ([1.0, math.nan], None, "finite, non-negative number per class; got nan"),
            ([math.inf, 1.0], None, "finite, non-negative number per class; got inf"),
            (3.0, None, r"one finite, non-negative number per class; got \[\]"),
            ([[1.0], [2.0]], None, r"one finite, non-negative number per class; got \[2, 1\]"),
            (["a", "b"], None, "must be null, 'balanced' or a list"),
        ],
    )
    def test_what_is_no_weight_is_refused(self, weight, counts, message):
        with pytest.raises(LossError, match=message):
            Criterion("cross_entropy", weight=weight, class_counts=counts)

    def test_a_weight_for_another_number_of_classes_is_refused(self):
        criterion = Criterion("cross_entropy", weight=[1.0, 2.0])
        with pytest.raises(LossError, match=r"loss\.weight has 2 values for 3 classes"):
            criterion(torch.zeros(1, 3), torch.tensor([0]))

    def test_the_callers_tensor_is_copied(self):
        weight = torch.tensor([1.0, 2.0])
        criterion = Criterion("cross_entropy", weight=weight)
        weight.zero_()
        assert criterion.options["weight"] == [1, 2]


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("cross_entrop", {}, "unknown loss 'cross_entrop'. Did you mean 'cross_entropy'"),
            (
                "cross_entropy",
                {"label_smothing": 0.1},
                "unknown option of loss 'cross_entropy' 'label_smothing'. "
                "Did you mean 'label_smoothing'",
            ),
            ("cross_entropy", {"label_smoothing": -0.1}, r"lie in \[0, 1\], got -0.1"),
            ("cross_entropy", {"label_smoothing": 1.1}, r"lie in \[0, 1\], got 1.1"),
            ("cross_entropy", {"label_smoothing": math.nan}, r"lie in \[0, 1\], got nan"),
            ("cross_entropy", {"label_smoothing": "much"}, r"lie in \[0, 1\], got much"),
        ],
    )
    def test_unknown_names_and_values_are_named(self, name, options, message):
        with pytest.raises(LossError, match=message):
            Criterion(name, **options)

    def test_options_are_plain_data(self):
        criterion = Criterion("softmax_nll", weight=torch.tensor([1.0, 2.0]), label_smoothing=0.1)
        assert criterion.options == {
            "weight": [1.0, 2.0],
            "ignore_index": -100,
            "label_smoothing": 0.1,
        }

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
    def test_it_survives_copying_and_pickling(self, twin):
        logits, target = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0, 1])
        criterion = Criterion("cross_entropy", weight=[1.0, 2.0], label_smoothing=0.1)
        assert twin(criterion)(logits, target) == criterion(logits, target)


class TestBatches:
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (torch.tensor([0, 3]), r"target 1 is 3: classes lie in \[0, 2\], or are -100"),
            (torch.tensor([-1, 0]), "target 0 is -1"),
            (torch.tensor([0, 1], dtype=torch.int32), "dtype torch.int32"),
            (torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.5]]), r"target 1 sums to 1\.5"),
            (torch.tensor([[0, 1, 0], [1, 0, 0]]), r"shape \[2, 3\]: classes are \[N\]"),
            (torch.tensor([0.0, 1.0]), r"shape \[2\]: class probabilities are \[N, 3\]"),
        ],
    )
    @each_formulation
    def test_targets_that_are_no_targets_are_named(self, name, target, message):
        with pytest.raises(DataError, match=message):
            Criterion(name)(torch.zeros(2, 3), target)

    @pytest.mark.parametrize(
        ("logits", "target"),
        [((2, 3, 4), (2,)), ((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 4)), ((2, 3), ())],
    )
    def test_shapes_that_do_not_fit_are_named(self, logits, target):
        with pytest.raises(LossError) as caught:
            Criterion("cross_entropy")(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))
        assert str(list(logits)) in str(caught.value)
        assert str(list(target)) in str(caught.value)


def half_squared_margin(
    logits: Tensor,
    target: Tensor,
    *,
    margin: float = 1.0,
    kind: Literal["hard", "soft"] = "hard",
    ignore_index: int = -100,
) -> Tensor:
    """A loss by import path, with options of its own."""
    safe = target.masked_fill(target == ignore_index, 0)
    true = logits.gather(1, safe.unsqueeze(1)).squeeze(1)
    return ((margin - true).clamp(min=0) ** 2 / 2).masked_fill(target == ignore_index, 0)


def requires_gamma(logits: Tensor, target: Tensor, *, gamma: float) -> Tensor:
    return gamma * logits.sum(-1)


def by_frequency(logits: Tensor, target: Tensor, *, class_counts: Tensor) -> Tensor:
    return F.cross_entropy(logits + class_counts.log(), target, reduction="none")


class LearnedTemperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self, *, initial: float = 1.0) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        scaled = logits / self.log_temperature.exp()
        return F.cross_entropy(
            scaled, target, weight=weight, ignore_index=ignore_index, reduction="none"
        )


class TestOtherLosses:
    @pytest.fixture
    def registered(self) -> Iterator[Any]:
        names = []

        def call(loss: Any, name: str) -> str:
            registry.register(loss, name=name)
            names.append(name)
            return name

        yield call
        for name in names:
            registry.unregister(name)

    def test_a_scalar_is_refused(self, registered):
        name = registered(lambda logits, target: F.cross_entropy(logits, target), "mean")
        with pytest.raises(LossError, match=r"loss 'mean' returned \[\] for 2 rows"):
            Criterion(name)(torch.zeros(2, 3), torch.tensor([0, 1]))

    def test_what_is_no_tensor_is_refused(self, registered):
        name = registered(lambda logits, target: 0.5, "number")
        with pytest.raises(LossError, match="loss 'number' returned float for 2 rows"):
            Criterion(name)(torch.zeros(2, 3), torch.tensor([0, 1]))

    def test_a_detached_result_is_refused_where_a_gradient_is_wanted(self, registered):
        name = registered(lambda logits, target: logits.detach().sum(-1), "detached")
        target = torch.tensor([0, 1])
        Criterion(name)(torch.zeros(2, 3), target)
        with pytest.raises(LossError, match="'detached' returned a result without gradient"):
            Criterion(name)(torch.zeros(2, 3, requires_grad=True), target)
        with torch.no_grad():  # then none is wanted
            Criterion(name)(torch.zeros(2, 3, requires_grad=True), target)

    def test_capabilities_that_a_loss_lacks_are_refused(self, registered):
        name = registered(lambda logits, target: logits.sum(-1), "plain")
        with pytest.raises(LossError, match=r"'plain' takes classes .* not probabilities"):
            Criterion(name)(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
        with pytest.raises(LossError, match="unknown option of loss 'plain' 'weight'"):
            Criterion(name, weight=[1.0, 2.0])
        with pytest.raises(LossError, match="unknown option of loss 'plain' 'label_smoothing'"):
            Criterion(name, label_smoothing=0.1)
        # A loss that does not ignore rows has none to ignore.
        with pytest.raises(DataError, match="target 0 is -100"):
            Criterion(name)(torch.zeros(1, 2), torch.tensor([IGNORED]))

    def test_what_is_switched_off_needs_no_capability(self, registered):
        name = registered(lambda logits, target: logits.sum(-1), "plain")
        assert Criterion(name, weight=None, label_smoothing=0.0).options == {}

    def test_a_weight_tensor_that_a_loss_lacks_is_refused(self, registered):
        name = registered(lambda logits, target: logits.sum(-1), "plain")
        with pytest.raises(LossError, match="unknown option of loss 'plain' 'weight'"):
            Criterion(name, weight=torch.ones(2))

    def test_required_options_and_choices(self, registered):
        name = registered(requires_gamma, "requires_gamma")
        with pytest.raises(LossError, match=r"'requires_gamma' requires loss\.gamma"):
            Criterion(name)
        assert Criterion(name, gamma=2.0)(torch.ones(1, 3), torch.tensor([0])).total == 6
        name = registered(half_squared_margin, "margin")
        with pytest.raises(LossError, match=r"loss\.kind 'sfot'\. Did you mean 'soft'"):
            Criterion(name, kind="sfot")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast_stays_outside_also_where_it_would_round(self, registered, dtype):
        """Of the formulations' operations it casts none on a CPU; a matrix product it does."""
        name = registered(lambda logits, target: (logits @ logits.T).diagonal(), "product")
        logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        target = torch.tensor([0, 1, 2, 0])
        expected = Criterion(name).per_sample(logits, target)
        with torch.autocast("cpu", dtype):
            assert torch.equal(Criterion(name).per_sample(logits, target), expected)

    def test_class_counts_come_from_the_training_set(self, registered):
        name = registered(by_frequency, "by_frequency")
        with pytest.raises(LossError, match="'by_frequency' needs class_counts"):
            Criterion(name)
        logits, target = torch.zeros(2, 2), torch.tensor([0, 1])
        losses = Criterion(name, class_counts=[1, 3]).per_sample(logits, target)
        expected = [math.log(4), math.log(4 / 3)]  # -log of each class's share
        assert losses.tolist() == pytest.approx(expected, rel=1e-6)  # float32

    def test_a_loss_by_import_path(self, monkeypatch, tmp_path):
        (tmp_path / "own_losses.py").write_text(
            "def scaled(logits, target, *, factor: float = 1.0):\n"
            "    return factor * logits.sum(-1)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        options = {"target": "own_losses:scaled", "options": {"factor": 3.0}}
        criterion = Criterion("custom", **options)
        assert criterion(torch.ones(2, 2), torch.tensor([0, 1])).total == 12
        own = {"target": "torch.nn.functional:cross_entropy"}
        weight = torch.tensor([1.0, 3.0])  # of a call from Python, as a registered loss takes it
        weighted = Criterion("custom", **own, options={"weight": weight})
        assert weighted(torch.zeros(2, 2), torch.tensor([0, 1])).mass == 4
        with pytest.raises(LossError, match=r"'custom' 'facto'\. Did you mean 'factor'"):
            Criterion("custom", target="own_losses:scaled", options={"facto": 3.0})

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("math.sqrt", r"loss\.target must read package\.module:function, got 'math\.sqrt'"),
            ("no_such_module:loss", "cannot be imported: No module named 'no_such_module'"),
            ("math:no_such_function", "cannot be imported: .* 'no_such_function'"),
            ("math:pi", "is a float, not a function or class"),
            ("math:hypot", "has no signature"),  # a builtin: its options cannot be read
        ],
    )
    def test_an_import_path_that_leads_nowhere_is_named(self, target, message):
        with pytest.raises(LossError, match=message):
            Criterion("custom", target=target)

    def test_a_module_class_keeps_its_parameters(self, registered):
        name = registered(LearnedTemperature, "temperature")
        criterion = Criterion(name, initial=2.0, weight=[1.0, 3.0])
        assert list(dict(criterion.named_parameters())) == ["loss.log_temperature"]
        logits, target = torch.tensor([[2.0, 0.0], [math.nan, 1.0]]), torch.tensor([1, IGNORED])
        loss = criterion(logits, target)
        assert loss.mass == 3
        # Temperature 2 turns a gap of 2 into one of 1.
        assert loss.total.item() == pytest.approx(3 * math.log1p(math.e), rel=1e-6)  # float32
        loss.total.backward()
        assert criterion.loss.log_temperature.grad.isfinite()

    def test_two_criteria_of_a_module_class_share_no_parameter(self, registered):
        name = registered(LearnedTemperature, "temperature")
        first, second = Criterion(name), Criterion(name, initial=3.0)
        assert first.loss.log_temperature is not second.loss.log_temperature
