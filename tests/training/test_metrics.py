"""Metrics: held to torchmetrics, and the same for every batch and rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from equiloss.distributed.process_groups import run_ranks
from equiloss.losses import Criterion
from equiloss.training.metrics import CALIBRATION_BINS, Evaluated, EvaluationMetric

IGNORED = -100
OPTIONS = {"weight": [0.5, 1.0, 2.0, 4.0, 1.5, 1.0, 3.0], "label_smoothing": 0.1}


def batch(
    rows: int = 200, classes: int = 7, *, ignored: bool = False, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits [N, K] that are right more often than not, and their targets."""
    generator = torch.Generator().manual_seed(rows + classes)
    target = torch.randint(classes, (rows,), generator=generator)
    logits = 2 * torch.randn(rows, classes, generator=generator) + 2 * F.one_hot(target, classes)
    if ignored:
        target[::3] = IGNORED
    if soft:
        return logits, torch.randn(rows, classes, generator=generator).softmax(-1)
    return logits, target


def evaluate(
    logits: Tensor, target: Tensor, *, sizes: list[int] | None = None, **options: Any
) -> Evaluated:
    """Figures of these rows, fed in batches of `sizes`."""
    criterion = Criterion("cross_entropy", **options)
    metric = EvaluationMetric(logits.shape[1], ignore_index=IGNORED)
    sizes = [len(target)] if sizes is None else sizes
    for x, y in zip(logits.split(sizes), target.split(sizes), strict=True):
        metric.update(x, y, criterion.exact_sum(x, y))
    return metric.evaluate()


class TestAgainstOthers:
    @pytest.mark.parametrize("classes", [2, 3, 5, 7])
    @pytest.mark.parametrize("ignored", [False, True])
    def test_torchmetrics(self, classes, ignored):
        logits, target = batch(classes=classes, ignored=ignored)
        got = evaluate(logits, target).scalars
        options: dict[str, Any] = {"num_classes": classes, "ignore_index": IGNORED}
        others = {
            "acc": MulticlassAccuracy(average="micro", **options),
            "acc_top5": MulticlassAccuracy(average="micro", top_k=min(5, classes), **options),
            "ece": MulticlassCalibrationError(n_bins=CALIBRATION_BINS, norm="l1", **options),
        }
        for name, other in others.items():
            # torchmetrics counts in float32, and adds 200 confidences in it.
            assert got[name] == pytest.approx(other(logits, target).item(), abs=200 * 2**-24)

    def test_loss_is_pytorchs_mean_with_the_configured_options(self):
        logits, target = batch(ignored=True)
        weight = torch.tensor(OPTIONS["weight"])
        expected = F.cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
        # Two float32 sums of some 130 losses.
        assert evaluate(logits, target, **OPTIONS).scalars["loss"] == pytest.approx(
            expected.item(), rel=130 * 2**-23
        )

    def test_nll_is_plain_cross_entropy_whatever_the_loss(self):
        logits, target = batch()
        assert (
            evaluate(logits, target, **OPTIONS).scalars["nll"]
            == evaluate(logits, target).scalars["nll"]
            == pytest.approx(F.cross_entropy(logits.double(), target).item(), rel=2**-23)
        )


class TestDefinitions:
    def test_calibration_bins_hold_every_row_once(self):
        logits, target = batch()
        rows, confidence, right = evaluate(logits, target).calibration
        assert rows.sum() == len(target)
        assert right.sum() == (logits.argmax(-1) == target).sum()
        mean = confidence / rows.clamp(min=1)
        edges = torch.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
        seen = rows > 0
        assert (mean >= edges[:-1])[seen].all()
        assert (mean <= edges[1:])[seen].all()

    def test_a_sure_row_is_in_the_last_bin(self):
        got = evaluate(torch.tensor([[200.0, 0.0], [200.0, 0.0]]), torch.tensor([0, 1]))
        assert got.calibration[:, -1].tolist() == [2, 2, 1]
        assert got.scalars["ece"] == 0.5

    @pytest.mark.parametrize("classes", [2, 4, 5])
    def test_with_at_most_five_classes_all_are_in_the_top_five(self, classes):
        logits, target = batch(classes=classes)
        assert evaluate(logits, target).scalars["acc_top5"] == 1

    def test_confusion_has_the_true_class_in_rows(self):
        got = evaluate(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([2]))
        assert got.confusion.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]

    def test_balanced_accuracy_counts_every_class_that_occurs_alike(self):
        target = torch.tensor([0] * 8 + [1] * 2)  # and class 2 does not occur
        logits = F.one_hot(torch.tensor([0] * 8 + [1, 0]), 3).float()
        got = evaluate(logits, target).scalars
        assert got["acc"] == 0.9
        assert got["balanced_acc"] == (1.0 + 0.5) / 2

    def test_soft_targets_count_by_their_largest_class_except_in_the_losses(self):
        logits, target = batch(soft=True)
        soft, hard = evaluate(logits, target), evaluate(logits, target.argmax(-1))
        for name in ("acc", "balanced_acc", "acc_top5", "ece"):
            assert soft.scalars[name] == hard.scalars[name]
        expected = F.cross_entropy(logits.double(), target.double()).item()
        # Per row, float32 rounds K products and their sum.
        assert soft.scalars["nll"] == pytest.approx(expected, rel=7 * 2**-23)
        assert soft.scalars["loss"] == pytest.approx(expected, rel=200 * 2**-23)
        assert abs(hard.scalars["nll"] - expected) > 0.01

    def test_ignored_rows_count_as_samples_alone(self):
        logits, target = batch(ignored=True)
        kept = target != IGNORED
        logits[~kept] = math.nan
        with_ignored, without = evaluate(logits, target), evaluate(logits[kept], target[kept])
        assert (with_ignored.samples, without.samples) == (len(target), int(kept.sum()))
        for name, value in without.scalars.items():
            # Adding the ignored rows' zeros regroups a float32 sum of some 130 losses.
            assert with_ignored.scalars[name] == pytest.approx(value, rel=130 * 2**-23)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_without_a_softmax_are_wrong_and_do_not_end_the_evaluation(self, value):
        logits, target = batch()
        for row in (target == 0).nonzero():
            logits[row] = value
        got = evaluate(logits, target)
        assert math.isnan(got.scalars["nll"])
        assert math.isnan(got.scalars["ece"])
        counted = target != 0
        others = evaluate(logits[counted], target[counted]).scalars
        share = int(counted.sum()) / len(target)
        for name in ("acc", "acc_top5"):
            assert got.scalars[name] == pytest.approx(share * others[name])
        assert got.scalars["balanced_acc"] == pytest.approx(6 / 7 * others["balanced_acc"])
        assert got.confusion[0].tolist() == [0] * 7

    def test_of_equal_logits_the_lower_class_is_the_larger(self):
        got = evaluate(torch.zeros(8, 8), torch.arange(8)).scalars
        assert (got["acc"], got["acc_top5"]) == (1 / 8, 5 / 8)

    def test_probabilities_that_round_to_the_same_do_not_tie(self):
        logits = torch.tensor([[0.0, 2**-30]])
        assert logits.softmax(-1).unique().tolist() == [0.5]
        assert evaluate(logits, torch.tensor([1])).scalars["acc"] == 1

    @pytest.mark.parametrize("classes", [1, 3, 5, 15])
    def test_a_bin_holds_its_upper_edge(self, classes):
        """Guo's bins: 1/K of equal logits is an edge where K divides 15."""
        got = evaluate(torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64))
        assert got.calibration[0].nonzero().tolist() == [[CALIBRATION_BINS // classes - 1]]

    def test_sums_are_those_of_float64_over_any_number_of_rows(self):
        logits = torch.zeros(200_000, 2)
        logits[0] = 1e5  # a loss of 1e5 beside 200,000 of log 2, each lost in a sum of float32
        logits[0, 0] = 0
        target = torch.zeros(200_000, dtype=torch.int64)
        terms = F.cross_entropy(logits, target, reduction="none").double()
        assert evaluate(logits, target).scalars["loss"] == pytest.approx(
            terms.mean().item(), rel=1e-13
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_of_a_module_leaves_the_sums_alone(self, dtype):
        logits, target = batch()
        metric = EvaluationMetric(7)
        nn.ModuleList([metric]).to(dtype)
        metric.update(logits, target, Criterion("cross_entropy").exact_sum(logits, target))
        assert metric.evaluate().scalars == evaluate(logits, target).scalars

    def test_nothing_but_ignored_rows(self):
        logits, _ = batch(rows=4)
        got = evaluate(logits, torch.full((4,), IGNORED))
        assert got.samples == 4
        # Not a perfect 0, which would win any search.
        assert all(map(math.isnan, got.scalars.values()))


class TestSums:
    @settings(deadline=None, derandomize=True, max_examples=10)
    @given(data=st.data())
    def test_any_batches_add_up_to_one(self, data):
        kind = data.draw(st.sampled_from([{}, {"ignored": True}, {"soft": True}]))
        logits, target = batch(rows=40, **kind)
        cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=5)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]  # 0 included
        assert_same(
            evaluate(logits, target, sizes=sizes, **OPTIONS), evaluate(logits, target, **OPTIONS)
        )

    @pytest.mark.parametrize("counts", [[25, 15], [13, 0, 27]], ids=str)
    def test_any_ranks_add_up_to_one(self, counts):
        from rank_functions import evaluated

        # float64 logits: the only sums that are not exact are then sums of float64.
        logits, target = batch(rows=40, ignored=True)
        logits = logits.double()
        expected = evaluate(logits, target, **OPTIONS)
        for got in run_ranks(evaluated, len(counts), logits, target, counts, OPTIONS):
            confusion = torch.tensor(got["confusion"])
            calibration = torch.tensor(got["calibration"], dtype=torch.float64)
            assert_same(
                Evaluated(got["scalars"], got["samples"], confusion, calibration),
                expected,
                rel=1e-12,
            )

    def test_reset_begins_anew(self):
        logits, target = batch(rows=10)
        metric = EvaluationMetric(7)
        criterion = Criterion("cross_entropy")
        metric.update(logits, target, criterion(logits, target))
        first = metric.evaluate()
        metric.reset()
        metric.update(logits, target, criterion(logits, target))
        assert metric.evaluate().scalars == first.scalars
        assert metric.evaluate().samples == 10

    def test_no_gradient_is_kept(self):
        logits, target = batch(rows=10)
        logits.requires_grad_()
        metric = EvaluationMetric(7)
        metric.update(logits, target, Criterion("cross_entropy")(logits, target))
        assert not any(value.requires_grad for value in metric.compute().values())


def assert_same(got: Evaluated, expected: Evaluated, rel: float = 40 * 2**-23) -> None:
    """Integer counts exactly; sums of 40 losses as float32 may regroup them, if not told else."""
    assert got.samples == expected.samples
    assert torch.equal(got.confusion, expected.confusion)
    for name in ("acc", "balanced_acc", "acc_top5"):
        assert got.scalars[name] == expected.scalars[name]
    for name in ("loss", "nll"):
        assert got.scalars[name] == pytest.approx(expected.scalars[name], rel=rel)
    # The bins' own sums are float64 always; an ECE is a difference of two of them.
    assert got.scalars["ece"] == pytest.approx(expected.scalars["ece"], abs=1e-12)
    assert torch.equal(got.calibration[[0, 2]], expected.calibration[[0, 2]])
    torch.testing.assert_close(got.calibration[1], expected.calibration[1], rtol=1e-6, atol=1e-12)
