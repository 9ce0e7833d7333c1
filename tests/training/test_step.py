"""The same numbers on any number of processes, in whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import NonFiniteError
from equiloss.losses.criterion import Criterion
from equiloss.records.results import Result, read_metrics
from equiloss.run import run
from equiloss.training.classifier import Classifier
from equiloss.training.step import MicroBatches
from rank_functions import run_in_rank
from support import Run, Train, composed, final_weights, slow

# 100 float64 steps over the digits, whose 1,150 rows leave no short batch of 50; the fourth
# epoch is cut short by max_steps.
OPTIONS = (
    "callbacks=quiet",
    "parity=off",
    "logger=csv",
    "trainer.precision=64-true",
    "trainer.max_steps=100",
    "trainer.threads=1",
    "data.batch_size=50",
    "loss.weight=[0.5,1.6,2.0,1.5,0.7,1.0,3.0,1.0,0.2,1.1]",
    "loss.label_smoothing=0.1",
    "model.options.widths=[8,16]",
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    run(composed(*OPTIONS), directory)
    return directory


def relative_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == 100
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def weight_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=slow)])
def test_every_step_is_that_of_one_process(
    launched: bool, one_process: Path, train: Train, tmp_path: Path
) -> None:
    """Also as a user launches it; `equiloss.invariance.trajectories` has the other splits."""
    several = tmp_path / "several"
    words = (*OPTIONS, "trainer=ddp_cpu")
    if launched:
        done = train(*words, f"hydra.run.dir={several}")
        assert done.returncode == 0, done.stderr
    else:
        run_ranks(run_in_rank, 2, composed(*words), several)
    assert Result.read(several).world_size == 2
    # Float64 rounds at 1e-16; 100 steps amplify that to some 1e-14.
    losses = [read_metrics(place, "train/loss") for place in (several, one_process)]
    assert relative_difference(*losses) < 1e-12
    assert weight_difference(final_weights(several), final_weights(one_process)) < 1e-10


def test_control_a_mean_of_local_means_is_another_number(one_process: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    config = composed(
        *(option for option in OPTIONS if "model" not in option),
        "trainer=ddp_cpu",
        "model=custom",
        "model.target=stand_ins:with_local_means",
    )
    run_ranks(run_in_rank, 2, config, several)
    losses = [read_metrics(place, "train/loss") for place in (several, one_process)]
    assert relative_difference(*losses) > 1e-3
    assert weight_difference(final_weights(several), final_weights(one_process)) > 1e-3


def test_parameters_without_a_gradient_count_as_zero(tmp_path: Path) -> None:
    """Those that no image uses, and those that only another rank's images use: weights decay."""
    options = (
        *(option for option in OPTIONS if "model" not in option and "batch_size" not in option),
        "trainer.max_steps=20",
        "data.batch_size=7",
        "model=custom",
        "model.target=stand_ins:routed",
        "optimizer=adamw",
    )
    run(composed(*options), tmp_path / "one")
    several = composed(*options, "trainer=ddp_cpu", "trainer.micro_batch_size=2")
    run_ranks(run_in_rank, 2, several, tmp_path / "several")
    one, two = (final_weights(tmp_path / name) for name in ("one", "several"))
    assert weight_difference(one, two) < 1e-13


def test_more_processes_than_samples(tmp_path: Path) -> None:
    config = composed(
        "trainer=ddp_cpu",
        "trainer.devices=3",
        "data=custom",
        "data.target=stand_ins:few_samples",
        "data.options={train: 2, val: 2, test: 1}",
        "trainer.max_epochs=2",
        "trainer.micro_batch_size=1",
        "callbacks=quiet",
    )
    run_ranks(run_in_rank, 3, config, tmp_path / "run")
    result = Result.read(tmp_path / "run")
    assert result.world_size == 3
    assert result.samples == {"train_seen": 4, "val": 2, "test": 1}
    assert result.parity["agree"]


def test_a_batch_without_mass_has_loss_0_and_changes_no_weight(run_here: Run, tmp_path) -> None:
    result = run_here(
        "data=custom",
        "data.target=stand_ins:ignored_rows",
        "data.options={share: 1}",
        "optimizer.weight_decay=0",
        "trainer.max_epochs=2",
    )
    assert result.steps == {"taken": 4, "skipped": 0, "zero_mass": 4}
    assert read_metrics(tmp_path / "run", "train/loss") == [0.0] * 4
    assert read_metrics(tmp_path / "run", "train/grad_norm") == [0.0] * 4


def test_clipping_bounds_the_synchronised_gradient(tmp_path: Path) -> None:
    # A step of plain SGD with rate 1 moves the weights by the clipped gradient.
    initial = run_custom(tmp_path / "initial", "optimizer.lr=1e-30")
    clipped = run_custom(tmp_path / "clipped", "optimizer.gradient_clip_norm=0.01")
    assert read_metrics(tmp_path / "clipped", "train/grad_norm")[0] > 0.01
    moved = sum(float((clipped[name] - initial[name]).square().sum()) for name in initial)
    # torch divides by norm + 1e-6 when it clips.
    assert moved**0.5 == pytest.approx(0.01, rel=1e-5)


def run_custom(directory: Path, *overrides: str) -> dict[str, Tensor]:
    """Weights after one step of plain SGD with rate 1."""
    directory.mkdir()
    config = composed(
        "optimizer.lr=1",
        "optimizer.weight_decay=0",
        "optimizer.options={momentum: 0, nesterov: false}",
        "scheduler=constant",
        "trainer.max_steps=1",
        "trainer.precision=64-true",
        "callbacks=quiet",
        *overrides,
    )
    run(config, directory)
    return final_weights(directory)


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Classifier] = []

    class Kept(Classifier):
        def on_fit_start(self) -> None:
            made.append(self)

    monkeypatch.setattr("equiloss.run.Classifier", Kept)
    config = composed(
        "model=custom",
        "model.target=stand_ins:growing",
        "model.options={gap: 95.0, at: 3}",
        "loss=softmax_nll",
        "callbacks=quiet",
        "checkpoint.every_n_steps=1",
    )
    with pytest.raises(NonFiniteError) as caught:
        run(config, tmp_path)
    message = str(caught.value)
    for part in ("step 3", "rank 0", "logits from", "log_softmax_nll", "87.3"):
        assert part in message
    assert "loss (5" in message  # the loss itself is still a finite 50 nats
    assert len(read_metrics(tmp_path, "train/loss")) == 3
    # The weights are those that step 2 left, and saved.
    saved = final_weights(tmp_path)
    assert all(torch.equal(made[0].state_dict()[name], saved[name]) for name in saved)


def test_a_gradient_that_is_not_finite_stops_every_rank(train: Train, tmp_path: Path) -> None:
    done = train(
        "model=custom",
        "model.target=stand_ins:growing",
        "model.options={gap: 95.0, at: 3}",
        "loss=softmax_nll",
        "callbacks=quiet",
        "trainer=ddp_cpu",
        f"hydra.run.dir={tmp_path}/run",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("step 3", "rank 0", "rank 1", "logits from", "log_softmax_nll"):
        assert part in done.stderr
    assert Result.read(tmp_path / "run").status == "failed"


def test_cross_entropy_goes_on_where_softmax_nll_is_out_of_its_domain(tmp_path: Path) -> None:
    config = composed(
        "model=custom",
        "model.target=stand_ins:scaled",
        "model.options={gap: 200.0}",
        "callbacks=quiet",
        "parity.policy=raise",
        "trainer.max_epochs=1",
    )
    result = run(config, tmp_path)
    assert result.status == "completed"
    assert result.parity["agree"]
    assert result.parity["softmax_nll"]["out_of_domain"] > 0
    assert result.parity["softmax_nll"]["nonfinite"] > 0
    assert result.parity["cross_entropy"]["out_of_domain"] == 0


@pytest.mark.parametrize(
    ("options", "ignored_rows", "rows", "known"),
    [
        ({}, False, 5, True),
        ({"label_smoothing": 0.1}, False, 5, True),
        ({"weight": [1.0, 2.0, 0.5]}, False, 5, False),
        ({}, True, 5, False),
        ({}, None, 5, False),  # nobody has looked at the targets
        ({}, False, 0, False),  # a batch that does not say what it is part of
    ],
)
def test_a_mass_travels_only_where_rows_may_differ(
    options: dict[str, Any],
    ignored_rows: bool | None,
    rows: int,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []

    def start_sum(value: Tensor) -> collectives.PendingSum:
        sent.append(value)
        return collectives.PendingSum(value, None)

    monkeypatch.setattr(collectives, "start_sum", start_sum)
    criterion = Criterion("cross_entropy", **options)
    criterion.expect(ignored_rows=ignored_rows)
    module: Any = SimpleNamespace(criterion=criterion, loss_dtype=torch.float64)
    target = torch.tensor([0, 2])  # this rank's
    batch = Batch(torch.empty(2, 1, 1, 1), target, torch.arange(2), epoch=0, rows=rows)
    mass = MicroBatches(module, None)._mass(batch).wait()
    assert mass.dtype == torch.float64
    assert mass == (rows if known else criterion.mass(target, torch.float64))
    assert len(sent) == (not known)
