from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stand_ins
from equiloss.config import ParityConfig
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import LossError, ParityError
from equiloss.losses import register, registry
from equiloss.losses.criterion import Criterion
from equiloss.losses.projection import Logits
from equiloss.parity.monitor import ParityMonitor, Seen
from equiloss.records.results import Result, read_metrics
from equiloss.training.step import StepOutcome
from rank_functions import run_in_rank
from support import PYTHONPATH, QUIET, Install, Run, Train, composed, slow

FAULTS = ("wrong_smoothing", "missing_weight", "extra_ignored_row")
WEIGHT = [0.5, 1.6, 2.0, 1.5, 0.7, 1.0, 3.0, 1.0, 0.2, 1.1]
OPTIONS = {"weight": [0.5, 2.0, 1.5, 0.7], "label_smoothing": 0.1}


@pytest.fixture
def faulty() -> Iterator[None]:
    """The faulty losses of `stand_ins`, registered under their own names."""
    for name in FAULTS:
        register(getattr(stand_ins, name))
    yield
    for name in FAULTS:
        registry.unregister(name)


def monitor(criterion: Criterion, *formulations: str, policy: str = "log") -> ParityMonitor:
    config = ParityConfig(every_n_steps=1, policy=policy, formulations=list(formulations))
    return ParityMonitor(config, criterion, total_steps=10, seed=0)


def seen(
    criterion: Criterion, logits: torch.Tensor, target: torch.Tensor
) -> tuple[Seen, StepOutcome]:
    """What a step of one process sees, and what it makes of it."""
    total, mass = criterion(logits, target)
    outcome = StepOutcome((total / mass).item(), mass.item(), 1.0, skipped=False, stop=False)
    return Seen(Logits(logits), target, criterion), outcome


def trained_logits(rows: int, margin: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits that put every row right by about `margin`, and their targets."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (rows,), generator=generator)
    logits = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return logits + margin * torch.nn.functional.one_hot(target, 4), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 20.0, 60.0])
def test_right_formulations_agree_from_first_logits_to_trained_ones(
    dtype: torch.dtype, margin: float
) -> None:
    criterion = Criterion("cross_entropy", **OPTIONS)
    check = monitor(criterion, "softmax_nll", "log_softmax_nll", "cross_entropy")
    logits, target = trained_logits(256, margin, dtype)
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    assert check.summary()["agree"], check.summary()


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("margin", [0.0, 20.0, 60.0])
def test_a_fault_is_found_on_first_logits_and_on_trained_ones(fault: str, margin: float) -> None:
    criterion = Criterion("cross_entropy", **OPTIONS)
    check = monitor(criterion, "cross_entropy", fault)
    logits, target = trained_logits(256, margin, torch.float32)
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    found = check.summary()
    assert not found["agree"]
    assert found["cross_entropy"]["agree"]
    # Far beyond the bound, not at its edge.
    assert found[fault]["ratio"] > 100


@pytest.mark.parametrize("margin", [0.0, 20.0])
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_a_mass_that_is_off_by_one_is_found(
    margin: float, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Criterion.mass
    monkeypatch.setattr(Criterion, "mass", lambda *arguments: right(*arguments) + 1)
    criterion = Criterion("cross_entropy", **options)
    check = monitor(criterion, "cross_entropy")
    logits, target = trained_logits(256, margin, torch.float32)
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    assert not check.summary()["agree"]
    assert check.summary()["mass_error"] == pytest.approx(1, abs=1e-3)  # float32 sum of weights


def test_a_loss_that_is_not_that_of_the_gathered_batch_is_found() -> None:
    criterion = Criterion("cross_entropy")
    check = monitor(criterion, "cross_entropy")
    logits, target = trained_logits(64, 0.0, torch.float32)
    given, right = seen(criterion, logits, target)
    check.check(given, right._replace(loss=right.loss + 1e-4), step=0, rank=0)
    assert not check.summary()["agree"]
    assert check.summary()["global_error"] == pytest.approx(1e-4, rel=1e-2)  # float32 loss


def test_rows_out_of_the_domain_are_counted_and_not_judged() -> None:
    criterion = Criterion("cross_entropy")
    check = monitor(criterion, "softmax_nll", "cross_entropy")
    logits, target = trained_logits(16, 0.0, torch.float32)
    logits[3] = torch.tensor([200.0, 0.0, -50.0, 0.0])
    target[3] = 2
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    found = check.summary()
    assert found["agree"]
    assert found["softmax_nll"]["out_of_domain"] == 1
    assert found["softmax_nll"]["nonfinite"] == 1
    assert found["cross_entropy"]["out_of_domain"] == 0


def test_logits_that_are_not_finite_never_agree() -> None:
    criterion = Criterion("cross_entropy")
    check = monitor(criterion, "cross_entropy")
    logits, target = trained_logits(16, 0.0, torch.float32)
    logits[0, 0] = torch.nan
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    assert not check.summary()["agree"]


def test_ignored_rows_may_hold_anything() -> None:
    criterion = Criterion("cross_entropy", ignore_index=-1)
    check = monitor(criterion, "softmax_nll", "cross_entropy")
    logits, target = trained_logits(16, 0.0, torch.float32)
    logits[0], target[0] = 1e30, -1
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    assert check.summary()["agree"]


def test_an_empty_batch_agrees() -> None:
    criterion = Criterion("cross_entropy", **OPTIONS)
    check = monitor(criterion, "softmax_nll", "cross_entropy")
    logits, target = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    nothing = StepOutcome(0.0, 0.0, 0.0, skipped=False, stop=False)
    check.check(Seen(Logits(logits), target, criterion), nothing, step=0, rank=0)
    assert check.summary()["agree"]


@pytest.mark.usefixtures("faulty")
def test_the_policy_decides_what_a_disagreement_does(caplog: pytest.LogCaptureFixture) -> None:
    criterion = Criterion("cross_entropy", **OPTIONS)
    logits, target = trained_logits(16, 0.0, torch.float32)
    step = seen(criterion, logits, target)
    with caplog.at_level(logging.WARNING):
        monitor(criterion, "wrong_smoothing").check(*step, step=7, rank=0)
        assert not caplog.records
        warns = monitor(criterion, "wrong_smoothing", policy="warn")
        warns.check(*step, step=7, rank=0)
        assert "step 7: wrong_smoothing" in caplog.text
    with pytest.raises(ParityError, match="step 7: wrong_smoothing"):
        monitor(criterion, "wrong_smoothing", policy="raise").check(*step, step=7, rank=0)


def test_a_formulation_without_an_option_that_the_run_uses_is_refused() -> None:
    @register(name="weightless")
    def weightless(logits: torch.Tensor, target: torch.Tensor, *, ignore_index: int = -100): ...

    try:
        with pytest.raises(LossError, match="'weightless' has no weight"):
            monitor(Criterion("cross_entropy", weight=[1.0, 2.0]), "weightless")
    finally:
        registry.unregister("weightless")


def test_the_state_survives_a_checkpoint() -> None:
    criterion = Criterion("cross_entropy", **OPTIONS)
    check = monitor(criterion, "cross_entropy")
    logits, target = trained_logits(16, 0.0, torch.float32)
    check.check(*seen(criterion, logits, target), step=0, rank=0)
    resumed = monitor(criterion, "cross_entropy")
    resumed.load_state_dict(check.state_dict())
    assert resumed.summary() == check.summary()


@pytest.mark.parametrize(
    ("loss", "precision"),
    [
        ("softmax_nll", "32-true"),
        ("log_softmax_nll", "32-true"),
        ("cross_entropy", "32-true"),
        ("softmax_nll", "bf16-mixed"),
        ("cross_entropy", "64-true"),
        pytest.param("log_softmax_nll", "bf16-mixed", marks=slow),
        pytest.param("cross_entropy", "bf16-mixed", marks=slow),
        pytest.param("softmax_nll", "64-true", marks=slow),
        pytest.param("log_softmax_nll", "64-true", marks=slow),
    ],
)
def test_a_run_agrees_at_its_first_and_at_its_last_step(
    loss: str, precision: str, run_here: Run
) -> None:
    result = run_here(
        f"loss={loss}",
        "loss.label_smoothing=0.1",
        "loss.weight=balanced",
        f"trainer.precision={precision}",
        "trainer.max_epochs=4",
        "parity.policy=raise",
    )
    assert result.parity["agree"]
    assert result.parity["steps"] == 3  # steps 0, 50 and the last


@pytest.mark.parametrize(
    "precision", ["32-true", *(pytest.param(p, marks=slow) for p in ("64-true", "bf16-mixed"))]
)
def test_a_run_on_two_processes_agrees(precision: str, tmp_path) -> None:
    config = composed(
        "trainer=ddp_cpu",
        "callbacks=quiet",
        "logger=csv",
        "loss.weight=balanced",
        "loss.label_smoothing=0.1",
        f"trainer.precision={precision}",
        "trainer.max_steps=60",
        "parity.policy=raise",
    )
    run_ranks(run_in_rank, 2, config, tmp_path / "run")
    result = Result.read(tmp_path / "run")
    assert result.world_size == 2
    assert result.parity["agree"]
    assert result.parity["steps"] == 3


@pytest.mark.usefixtures("faulty")
def test_a_run_finds_faults_at_its_first_and_at_its_last_step(run_here: Run, tmp_path) -> None:
    formulations = ",".join(("cross_entropy", *FAULTS))
    result = run_here(
        "loss.label_smoothing=0.1",
        f"loss.weight={WEIGHT}",
        f"parity.formulations=[{formulations}]",
        "parity.policy=log",
        "trainer.max_epochs=8",
    )
    assert not result.parity["agree"]
    assert result.parity["cross_entropy"]["agree"]
    for fault in FAULTS:
        assert not result.parity[fault]["agree"]
        ratios = read_metrics(tmp_path / "run", f"parity/{fault}/ratio")
        assert ratios[0] > 100
        assert ratios[-1] > 100


STRICT = (
    "loss.label_smoothing=0.1",
    "logger=csv",
    "parity=strict",
    "parity.formulations=[cross_entropy,wrong_smoothing]",
)


def assert_leaves_its_verdict(run_dir: Path) -> None:
    """As a completed run does: whoever reads it needs no words of an error for that."""
    result = Result.read(run_dir)
    assert result.status == "failed"
    assert "wrong_smoothing (error" in str(result.error)
    assert result.parity["steps"] == 1
    assert result.parity["agree"] is False
    assert result.parity["cross_entropy"]["agree"] is True
    assert result.parity["wrong_smoothing"]["ratio"] > 100


@pytest.mark.usefixtures("faulty")
def test_a_run_that_strict_parity_stops_leaves_its_verdict(run_here: Run, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="step 0: wrong_smoothing"):
        run_here(*STRICT)
    assert_leaves_its_verdict(tmp_path / "run")


@slow
def test_a_command_that_strict_parity_stops_on_two_ranks_leaves_its_verdict(
    install: Install, train: Train, tmp_path: Path
) -> None:
    install("acme", "1.0", "wrong_smoothing = stand_ins:wrong_smoothing")
    path = os.pathsep.join([str(tmp_path / "acme"), PYTHONPATH])
    words = (*QUIET, *STRICT, "trainer.devices=2", f"hydra.run.dir={tmp_path}/run")
    assert train(*words, PYTHONPATH=path).returncode == 1
    assert_leaves_its_verdict(tmp_path / "run")


def test_a_run_finds_a_wrong_mass_at_its_first_and_at_its_last_step(
    run_here: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = Criterion.mass
    monkeypatch.setattr(Criterion, "mass", lambda *arguments: right(*arguments) + 1)
    with caplog.at_level(logging.WARNING):
        result = run_here("trainer.max_epochs=8")
    assert not result.parity["agree"]
    assert result.parity["mass_error"] == 1
    warned = [record.getMessage() for record in caplog.records if "the mass" in record.message]
    assert warned[0].startswith("parity, step 0:")
    assert warned[-1].startswith(f"parity, step {result.steps['taken'] - 1}:")
