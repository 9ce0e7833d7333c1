"""What scikit-learn computes too: the digits, splits, class weights and metrics.

Slow, because Lightning imports SciPy wherever it is installed: a second for each process of the
other tests. `make test-slow` installs scikit-learn.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiloss.config import DataConfig
from equiloss.data.datasets import load
from equiloss.data.digits import make
from equiloss.data.sampler import Slice
from equiloss.data.splits import SPLITS, holdout
from equiloss.losses import Criterion
from equiloss.training.metrics import EvaluationMetric

pytestmark = pytest.mark.slow


def test_the_digits() -> None:
    from sklearn.datasets import load_digits

    oracle = load_digits()
    expected = Counter(
        ((15 * image).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(oracle.images, oracle.target, strict=True)
    )
    splits = load(DataConfig(name="digits"))
    found: Counter[tuple[bytes, int]] = Counter()
    for split in SPLITS:
        source = getattr(splits, split)
        batch = source.__getitems__(Slice(0, torch.arange(len(source))))
        images = [image.numpy().tobytes() for image in batch.images]
        found.update(zip(images, batch.target.tolist(), strict=True))
    assert found == expected


def test_the_digits_file_is_what_its_script_makes(tmp_path: Path) -> None:
    make.main(tmp_path / "digits.npz")
    embedded = Path(make.__file__).with_name("digits.npz")
    with np.load(tmp_path / "digits.npz") as made, np.load(embedded) as stored:
        assert all(np.array_equal(made[key], stored[key]) for key in ("images", "targets"))


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=8),
    fraction=st.floats(0.1, 0.9),
)
def test_stratified_splits(counts: list[int], fraction: float) -> None:
    from sklearn.model_selection import train_test_split

    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    _, held = holdout(targets, fraction, seed=0)
    _, oracle = train_test_split(np.arange(len(targets)), test_size=len(held), stratify=targets)
    ours, theirs = (torch.bincount(targets[rows], minlength=len(counts)) for rows in (held, oracle))
    # Each rounds a class's share up or down.
    assert (ours - theirs).abs().max() <= 1


@settings(deadline=None, derandomize=True, max_examples=25)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_class_weights(labels: list[int]) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    classes = sorted(set(labels))
    counts = [labels.count(label) for label in classes]
    expected = compute_class_weight("balanced", classes=np.array(classes), y=labels)
    criterion = Criterion("cross_entropy", weight="balanced", class_counts=counts)
    weight = criterion.weight(torch.float64, torch.device("cpu"))
    assert weight is not None
    assert weight.tolist() == pytest.approx(expected.tolist(), rel=1e-15)  # a few roundings


def test_metrics() -> None:
    from sklearn.metrics import (
        balanced_accuracy_score,
        confusion_matrix,
        log_loss,
        top_k_accuracy_score,
    )

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 7, generator=generator)
    target = torch.randint(0, 7, (200,), generator=generator)
    metric = EvaluationMetric(7)
    metric.update(logits, target, Criterion("cross_entropy")(logits, target))
    got = metric.evaluate()
    p, labels = logits.double().softmax(-1).numpy(), list(range(7))
    expected = confusion_matrix(target, logits.argmax(-1), labels=labels)
    assert got.confusion.tolist() == expected.tolist()
    # Each of the losses is rounded to float32.
    assert got.scalars["nll"] == pytest.approx(log_loss(target, p, labels=labels), rel=2**-23)
    top5 = top_k_accuracy_score(target, p, k=5, labels=labels)
    assert got.scalars["acc_top5"] == pytest.approx(top5, rel=1e-15)
    balanced = balanced_accuracy_score(target, logits.argmax(-1))
    assert got.scalars["balanced_acc"] == pytest.approx(balanced, rel=1e-15)
