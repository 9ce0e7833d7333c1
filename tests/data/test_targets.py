"""Targets: what is accepted, and that the first wrong row is named."""

from __future__ import annotations

import pytest
import torch

from equiloss.errors import DataError
from equiloss.losses.validation import validate_targets


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 3]), r"train target 2 is 3: classes lie in \[0, 2\], or are -100"),
        (torch.tensor([0, -1, 3]), r"train target 1 is -1"),
        (torch.tensor([0, 1], dtype=torch.int32), "dtype torch.int32"),
        (torch.tensor([True, False]), "dtype torch.bool"),
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \[2, 3\]: classes are \[N\]"),
        (torch.tensor([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]]), r"target 1 is \[1.5, -0.5, 0\]"),
        (torch.tensor([[float("nan"), 0.5, 0.5]]), r"target 0 is \[nan, 0.5, 0.5\]"),
        (torch.tensor([[0.5, 0.5, 0.1]]), r"target 0 sums to 1.1: .* sum to 1"),
        (torch.tensor([[0.5, 0.5]]), r"shape \[1, 2\]: class probabilities are \[N, 3\]"),
    ],
)
def test_targets_that_are_no_targets_are_named(target, message):
    with pytest.raises(DataError, match=message):
        validate_targets(target, 3, -100, where="train target")


def test_ignored_rows_need_their_class_allowed():
    validate_targets(torch.tensor([0, 255]), 3, 255)
    with pytest.raises(DataError, match=r"target 1 is 255: classes lie in \[0, 2\]$"):
        validate_targets(torch.tensor([0, 255]), 3, None)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounded_probabilities_are_accepted(num_classes, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, num_classes, generator=generator)
    validate_targets(logits.softmax(1).to(dtype), num_classes)  # computed in float32
    # The control: a row off by twice the tolerance, where that is less than a whole class.
    tolerance = num_classes * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if tolerance < 0.1:
        wrong = torch.zeros(1, num_classes, dtype=dtype)
        wrong[0, 0] = 1 - 2 * tolerance
        with pytest.raises(DataError, match="target 0 sums to"):
            validate_targets(wrong, num_classes)


def test_no_targets_are_valid_targets():
    validate_targets(torch.zeros(0, dtype=torch.int64), 3, -100)
    validate_targets(torch.zeros(0, 3), 3)
