"""A machine that trains with another gradient is found, whatever the formulations say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equiloss.distributed.process_groups import run_ranks
from equiloss.parity.gradient import buckets, digest
from rank_functions import verdicts
from support import Run, slow

OPTIONS = (
    "callbacks=quiet",
    "logger=csv",
    "trainer.max_steps=3",
    "trainer.threads=1",
    "data.max_samples=100",
    "data.batch_size=23",
    "parity.policy=log",
    "model=mlp",
    "model.options.dropout=0.2",
    "loss.weight=balanced",
)
ARRANGEMENTS = {
    "float32": ("trainer.micro_batch_size=5",),
    "float64": ("trainer.precision=64-true",),
    "float32, whole": (),
    "float64, micro-batches": ("trainer.precision=64-true", "trainer.micro_batch_size=5"),
}
# What is wrong, and which figure says so.
WRONG = {
    "no factor of ranks": "gradient_ratio",
    "local means": "gradient_ratio",
    "twice the gradient": "gradient_ratio",
    "a parameter left out": "sum_ratio",
    "a negated gradient": "sum_ratio",
    "other weights": "ranks_differ",
    "another learning rate": "ranks_differ",
    "masks by rank": "row_ratio",
}
ALONE = ("twice the gradient",)


@pytest.mark.parametrize(
    ("ranks", "arrangement"),
    [
        (2, "float32"),
        *(pytest.param(2, name, marks=slow) for name in list(ARRANGEMENTS)[1:]),
        *(pytest.param(ranks, name, marks=slow) for ranks in (1, 3) for name in ARRANGEMENTS),
    ],
)
def test_a_wrong_machine_does_not_agree(ranks: int, arrangement: str, tmp_path: Path) -> None:
    wrong = tuple(WRONG) if ranks > 1 else ALONE
    options = (*OPTIONS, *ARRANGEMENTS[arrangement])
    (found, *others) = run_ranks(verdicts, ranks, tmp_path, ["nothing", *wrong], options)
    assert found["nothing"]["agree"], found["nothing"]
    assert all(other["nothing"] == found["nothing"] for other in others)
    for name in wrong:
        parity = found[name]
        assert not any(every[name]["agree"] for every in (found, *others)), name
        assert parity[WRONG[name]] > (WRONG[name] != "ranks_differ"), parity
        # The formulations see nothing of it: the logits are what they are.
        assert all(each["agree"] for each in parity.values() if isinstance(each, dict)), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("loss=focal",), marks=slow),
        ("loss=linear_cross_entropy", "model=mlp"),
        pytest.param(("data.augment.mixup=0.4", "optimizer.gradient_clip_norm=0.1"), marks=slow),
        ("trainer.reduction=bitwise",),
        ("trainer.precision=bf16-true",),
        ("trainer.precision=bf16-mixed", "trainer.micro_batch_size=7"),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_right_machine_agrees(options: tuple[str, ...], run_here: Run) -> None:
    parity = run_here(
        "data.max_samples=100", "trainer.max_steps=20", "parity.every_n_steps=3", *options
    ).parity
    assert parity["agree"], parity
    assert parity["gradient_ratio"] > 0 or "bf16-true" in options[0]


@pytest.mark.parametrize("formulations", ["[cross_entropy]", "[custom]"])
def test_a_loss_of_ones_own_is_called_what_it_is(formulations: str, run_here: Run) -> None:
    """One that is off cross-entropy by 1 %: another function, and no formulation of it."""
    result = run_here(
        *("loss=custom", "loss.target=stand_ins:off_by_a_percent", "trainer.max_steps=3"),
        *(f"parity.formulations={formulations}", "parity.policy=log"),
    )
    assert result.parity["trained_ratio"] > 1000
    assert result.parity["gradient_ratio"] <= 1
    assert result.parity["agree"] == (formulations != "[custom]")


def test_terms_that_cancel_in_rows_that_hardly_count_are_no_fault(run_here: Run) -> None:
    """How a loss rounds in a row of small gradient is its own affair: others decide the sum."""
    result = run_here(
        *("loss=custom", "loss.target=stand_ins:hinge_of_cancelling_terms", "model=mlp"),
        *(
            "optimizer=adamw",
            "optimizer.lr=0.01",
            "trainer.max_epochs=8",
            "parity.every_n_steps=10",
        ),
    )
    assert 0 < result.parity["gradient_ratio"] < 1


def test_a_digest_is_of_bits_and_places() -> None:
    one = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for other in (one.flip(0), -one, torch.nextafter(one, one + 1), one.roll(1)):
        assert not torch.equal(digest(one), digest(other))
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        assert torch.equal(digest(one.to(dtype)), digest(one.to(dtype).clone()))


def test_buckets_hold_every_parameter_once() -> None:
    dtypes: list[Any] = [torch.float32, torch.float32, torch.float64, torch.float32]
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    assert [len(bucket) for bucket in buckets(parameters)] == [2, 1, 1]
