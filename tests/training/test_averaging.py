"""Averaged weights are the recursion that they are said to be, however a run goes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn

from equiloss.config import EmaConfig
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import CheckpointError, ConfigError
from equiloss.invariance.interruption import bits, count_differing
from equiloss.invariance.rank_runs import config, last_checkpoint
from equiloss.launching import console
from equiloss.launching.stored_run import of_run
from equiloss.prediction.model import checkpoint_of
from equiloss.records.results import Result, read_columns, read_metrics
from equiloss.records.run_dir import written
from equiloss.run import run
from equiloss.training.averaging import Averaging
from equiloss.training.classifier import Classifier
from rank_functions import run_in_rank
from stops import StopBefore, StopError
from support import composed, final_weights, slow, wrong_with

# 38 training rows in batches of 9: five steps an epoch.
SMALL = (
    *("callbacks=quiet", "logger=csv", "parity=off", "data=synthetic", "data.batch_size=9"),
    *("data.options={num_samples: 60}", "trainer.max_epochs=2", "checkpoint.every_n_steps=1"),
    *("trainer.precision=64-true", "scheduler=constant", "trainer.threads=1"),
    *("model.options.widths=[8]",),
)
AVERAGED = (*SMALL, "ema.decay=0.8", "test_weights=ema")


class Files(Callback):
    """Keeps a copy of the file of averages that the first epoch has left."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            shutil.copy(self.run_dir / "checkpoints" / "ema.ckpt", first_file(self.run_dir))


def first_file(run_dir: Path) -> Path:
    """Where `Files` puts the averages of the first epoch."""
    return run_dir.with_name(f"{run_dir.name}.first.ckpt")


class Weights(Callback):
    """Keeps the network's weights from before the first step, and after each."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        named = pl_module.model.named_parameters()
        self.kept.append({name: p.detach().clone() for name, p in named})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


def averages(run_dir: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = last_checkpoint(run_dir)["callbacks"]["Averaging"]["averages"]
    return found


def weights(run_dir: Path, name: str) -> dict[str, Tensor]:
    """The network in a checkpoint of a run."""
    saved = final_weights(run_dir, name)
    return {key.removeprefix("model."): each for key, each in saved.items()}


@pytest.fixture(scope="module")
def kept() -> Weights:
    return Weights()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, kept: Weights) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(composed(*AVERAGED), directory, callbacks=[kept, Files(directory)])
    return directory


def test_they_are_the_recursion_over_every_step(whole: Path, kept: Weights) -> None:
    first, *after = kept.kept
    assert len(after) == 10
    for name, average in averages(whole).items():
        expected = first[name]
        for step, weight in enumerate(after):
            decay = min(0.8, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weight[name]
        # Some roundings of 1e-16 in each of ten steps.
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-14)
        assert (average - after[-1][name]).abs().max() > 1e-4


def test_the_file_has_them_as_the_weights_of_a_network(whole: Path, kept: Weights) -> None:
    averaged, raw = weights(whole, "ema.ckpt"), weights(whole, "last.ckpt")
    assert averaged.keys() == raw.keys()
    assert count_differing(averaged, raw | averages(whole)) == 0
    # The best by val/nll are none of them, but an epoch's weights.
    best, epochs = weights(whole, "best.ckpt"), (kept.kept[5], kept.kept[10])
    assert 0 in [count_differing(best, raw | epoch) for epoch in epochs]
    assert Result.read(whole).notes == []


@pytest.mark.parametrize("task", ["validate", pytest.param("test", marks=slow)])
def test_a_run_reports_what_its_file_evaluates_to(task: str, whole: Path, tmp_path: Path) -> None:
    """To the bit: both in the validation of every epoch, and in the test."""

    def evaluated(path: Path) -> dict[str, float]:
        config = composed(*SMALL, f"task={task}", f"ckpt_path={path}")
        return run(config, tmp_path / path.name).metrics

    reported = Result.read(whole).metrics
    last = evaluated(whole / "checkpoints" / "ema.ckpt")
    if task == "test":
        assert last == {name: reported[name] for name in last}
    else:
        first = evaluated(first_file(whole))
        for name in ("loss", "nll", "acc"):
            epochs = read_metrics(whole, f"val/ema_{name}")
            assert epochs == [first[f"val/{name}"], last[f"val/{name}"]]
            assert reported[f"val/ema_{name}"] == epochs[-1]
        assert reported["val/nll"] != reported["val/ema_nll"]


def test_a_directory_stands_for_them(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole / "config.yaml").write_text(composed(*AVERAGED).text)
    assert checkpoint_of(whole) == whole / "checkpoints" / "ema.ckpt"
    monkeypatch.setattr(HydraConfig, "initialized", lambda: False)
    asked = OmegaConf.create({**composed(*SMALL).plain, "task": "test", "run": str(whole)})
    evaluated = of_run(asked, ["task=test", f"run={whole}"])
    assert evaluated.ckpt_path == str(whole / "checkpoints" / "ema.ckpt")
    # Of a run that begins anew in this place it would be another's.
    assert whole / "checkpoints" / "ema.ckpt" in written(whole)


def test_what_a_reader_is_shown(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Result.read(whole), whole)
    value = Result.read(whole).metrics["val/ema_nll"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "ema_nll" in line)
    assert line.split("│")[2:4] == [f" {value:.4g} nats ", " " * 12]  # they have no test
    assert f"val/ema_nll {value:.6g}" in (whole / "train.log").read_text()


def test_without_them_the_weights_are_the_same_bits(whole: Path, tmp_path: Path) -> None:
    run(composed(*SMALL), tmp_path)
    assert count_differing(weights(tmp_path, "last.ckpt"), weights(whole, "last.ckpt")) == 0
    ours, theirs = read_columns(tmp_path), read_columns(whole)
    assert {*theirs} - {*ours} == {"val/ema_loss", "val/ema_nll", "val/ema_acc"}
    for name in {*ours} - {"train/samples_per_s"}:
        if not name.startswith("test/"):
            assert ours[name] == theirs[name], name
    assert not (tmp_path / "checkpoints" / "ema.ckpt").exists()
    header = (tmp_path / "metrics.csv").read_text().partition("\n")[0]
    assert "ema" not in header


@pytest.mark.parametrize("step", [7, pytest.param(3, marks=slow), pytest.param(5, marks=slow)])
def test_a_run_that_was_stopped_goes_on_with_them(step: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(composed(*AVERAGED), tmp_path, callbacks=[StopBefore(step)])
    run(composed(*AVERAGED), tmp_path)
    assert set(bits(tmp_path, whole).values()) == {0}
    assert count_differing(averages(tmp_path), averages(whole)) == 0
    ours, theirs = (Result.read(place).metrics for place in (tmp_path, whole))
    del ours["train/samples_per_s"], theirs["train/samples_per_s"]
    assert ours == theirs


@slow
def test_a_state_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(composed(*SMALL), tmp_path, callbacks=[StopBefore(2)])
    with pytest.raises(CheckpointError, match=r"continue: ema\.decay is 0\.8 now") as caught:
        run(composed(*AVERAGED), tmp_path)
    assert wrong_with(str(caught.value)) is None


def test_the_best_by_their_metric_are_the_averages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = ("checkpoint.monitor=val/ema_acc", "objective=val/ema_acc", "ema.warmup=false")
    with caplog.at_level("INFO", "equiloss.training.averaging"):
        result = run(composed(*SMALL, "ema.decay=0.5", *watched, "trainer.max_epochs=1"), tmp_path)
    assert "averaging the weights with decay 0.5: val/ema_" in caplog.text
    averaged = weights(tmp_path, "ema.ckpt")
    assert count_differing(weights(tmp_path, "best.ckpt"), averaged) == 0
    assert count_differing(weights(tmp_path, "last.ckpt"), averaged) > 0
    assert result.metrics["val/ema_acc"] == read_metrics(tmp_path, "val/ema_acc")[-1]


@slow
def test_a_fit_starts_from_them(whole: Path, tmp_path: Path) -> None:
    started = Weights()
    path = whole / "checkpoints" / "ema.ckpt"
    next_one = composed(*SMALL, f"init_from={path}", "trainer.max_steps=1")
    run(next_one, tmp_path, callbacks=[started])
    assert count_differing(started.kept[0], averages(whole)) == 0


def updated(network: nn.Module, step: int, *, skipped: bool = False) -> Averaging:
    """Averages of a network, after one step number `step` that adds 1 to what learns."""
    made = Averaging(EmaConfig(decay=0.75, warmup=False), Path())
    module: Any = SimpleNamespace(model=network)
    made.on_fit_start(SimpleNamespace(is_global_zero=False), module)  # type: ignore[arg-type]
    made.steps = step
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += parameter.requires_grad
    outcome: Any = SimpleNamespace(skipped=skipped)
    made.on_train_batch_end(None, module, {"outcome": outcome})  # type: ignore[arg-type]
    return made


def test_a_skipped_step_is_none() -> None:
    made = updated(nn.Linear(2, 1), 4, skipped=True)
    assert made.steps == 4
    made = updated(nn.Linear(2, 1), 4)
    assert made.steps == 5


def test_a_parameter_that_does_not_learn_is_its_own_average() -> None:
    network = nn.Linear(3, 2)
    network.weight.requires_grad_(False)
    made = updated(network, 0)
    assert torch.equal(made.averages["weight"], network.weight)
    torch.testing.assert_close(made.averages["bias"], network.bias.detach() - 0.75)


def test_half_precision_is_averaged_in_float32_and_evaluated_as_it_is() -> None:
    network = nn.Linear(3, 2).to(torch.bfloat16)
    before = network.weight.detach().clone()
    made = updated(network, 0)
    assert made.averages["weight"].dtype == torch.float32
    rise = network.weight.detach().float() - before.float()  # 1, as bfloat16 rounds it
    torch.testing.assert_close(made.averages["weight"], before.float() + 0.25 * rise)
    after, place = network.weight.detach().clone(), network.weight.data_ptr()
    with made.in_place():
        assert torch.equal(network.weight, made.averages["weight"].to(torch.bfloat16))
    assert torch.equal(network.weight, after)
    assert network.weight.data_ptr() == place


ON = {"ema": {"decay": 0.9}}
EXTRA = {"metrics": {"extra": {"ema_acc": {"name": "F1Score", "mode": "max"}}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema": {"decay": 1}}, r"ema\.decay must lie in \[0, 1\), got 1\.0"),
        ({"ema": {"decay": -0.1}}, r"got -0\.1"),
        ({"ema": {"decay": math.nan}}, "got nan"),
        ({"test_weights": "ema"}, r"test_weights=ema tests averaged .*: set ema\.decay"),
        (
            {"objective": "val/ema_nll"},
            r"objective=val/ema_nll is of averaged weights, .*ema\.decay",
        ),
        (
            {"checkpoint": {"monitor": "val/ema_acc"}},
            r"checkpoint\.monitor=val/ema_acc is of averaged",
        ),
        (
            {"early_stopping": {"monitor": "val/ema_loss"}},
            r"early_stopping\.monitor=val/ema_loss is",
        ),
        (
            ON | {"checkpoint": {"monitor": "val/ema_acc", "mode": "min"}},
            "mode=min would keep the worst val/ema_acc: it is max",
        ),
        (ON | {"objective": "test/ema_nll"}, "unknown objective 'test/ema_nll'"),
        (ON | EXTRA, r"metrics\.extra\.ema_acc: with ema\.decay a metric has that name"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config(changes)
    assert wrong_with(str(caught.value)) is None


def test_without_them_their_names_are_free() -> None:
    assert config(EXTRA, {"objective": "val/ema_acc"}).config.ema.decay is None


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_micro_batches_make_no_difference(whole: Path, tmp_path: Path) -> None:
    run(composed(*AVERAGED, "trainer.micro_batch_size=4"), tmp_path)
    # Float64 rounds at 1e-16, which ten steps amplify.
    assert largest_difference(averages(tmp_path), averages(whole)) < 1e-12
    for name in ("val/ema_loss", "val/ema_nll", "val/ema_acc", "test/nll"):
        assert read_metrics(tmp_path, name) == pytest.approx(read_metrics(whole, name), rel=1e-12)


@slow
def test_ranks_make_no_difference(whole: Path, tmp_path: Path) -> None:
    """On two all the way, and from the seventh step on."""
    with pytest.raises(StopError):
        run(composed(*AVERAGED), tmp_path / "second", callbacks=[StopBefore(7)])
    for place in ("first", "second"):
        split = composed(*AVERAGED, "trainer=ddp_cpu", "trainer.devices=2")
        run_ranks(run_in_rank, 2, split, tmp_path / place)
        result = Result.read(tmp_path / place)
        assert result.world_size == 2
        assert len(result.segments) == 1 + (place == "second")
        # As with micro-batches: sums in another order.
        assert largest_difference(averages(tmp_path / place), averages(whole)) < 1e-12
        for name in ("val/ema_loss", "val/ema_nll", "val/ema_acc", "test/nll"):
            found, expected = (read_metrics(each, name) for each in (tmp_path / place, whole))
            assert found == pytest.approx(expected, rel=1e-12)


@slow
@pytest.mark.parametrize(
    "options",
    [
        ("model=mlp", "model.options.widths=[8]", "model.compile=true"),
        ("model=mlp", "model.options.widths=[8]", "loss=linear_cross_entropy"),
        ("trainer.precision=bf16-true",),
        ("trainer.precision=bf16-mixed", "model.channels_last=true"),
        ("model=torchvision", "model.name=resnet18", "~model.options.widths", "data.batch_size=19"),
    ],
    ids=lambda options: options[-1].partition("=")[2],
)
def test_the_file_evaluates_alike(options: tuple[str, ...], tmp_path: Path) -> None:
    """Compiled, from features, in half precision, and beside running statistics."""
    fit = (*AVERAGED, *options, "trainer.max_epochs=2")
    reported = run(composed(*fit), tmp_path / "fit").metrics
    path = tmp_path / "fit" / "checkpoints" / "ema.ckpt"
    again = composed(*SMALL, *options, "task=validate", f"ckpt_path={path}")
    evaluated = run(again, tmp_path / "again").metrics
    for name in ("loss", "nll", "acc"):
        assert evaluated[f"val/{name}"] == reported[f"val/ema_{name}"]
