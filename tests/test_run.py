"""Whole runs in this process: what they reach, and what they leave behind."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from equiloss.config import SPLIT_METRICS
from equiloss.config.resolved import PRESENTATION
from equiloss.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LossError,
    ModelError,
    UserError,
)
from equiloss.losses import Criterion
from equiloss.records.results import TRAIN_METRICS, Result, metric_names, read_metrics
from equiloss.records.writing import FileError
from equiloss.run import run
from support import QUIET, ROOT, Run, composed, final_weights, slow

FORMULATIONS = ("softmax_nll", "log_softmax_nll", "cross_entropy")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def test_the_default_run_reads_the_digits(tmp_path: Path) -> None:
    result = run(composed("callbacks=quiet"), tmp_path)
    assert result.metrics["test/acc"] >= 0.975
    assert result.parity["agree"]
    assert result.samples == {"train_seen": 15 * 1150, "val": 288, "test": 359}


@pytest.mark.real_data
@pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
@slow
@pytest.mark.parametrize("widths", ["[16,32]", "[32,64]"])
def test_an_epoch_of_the_real_fashion_mnist(widths: str, tmp_path: Path) -> None:
    config = composed(
        "data=fashion_mnist",
        f"model.options.widths={widths}",
        "trainer.max_epochs=1",
        "callbacks=quiet",
        "parity.every_n_steps=100",
    )
    result = run(config, tmp_path)
    assert result.samples["test"] == 10_000
    assert result.samples["train_seen"] + result.samples["val"] == 60_000
    assert result.metrics["test/acc"] >= 0.85
    assert result.parity["agree"]


LOSS = ("loss=softmax_nll", "loss.label_smoothing=0.1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two epochs has left what the tests that follow read."""
    directory = tmp_path_factory.mktemp("trained")
    run(composed(*QUIET, *LOSS, "trainer.max_epochs=2", "test_weights=last"), directory)
    return directory


def test_results_have_every_key(trained: Path) -> None:
    found = json.loads((trained / "results.json").read_text())
    assert found["status"] == "completed"
    assert len(found["config_hash"]) == 64
    assert found["loss"]["name"] == "softmax_nll"
    assert found["loss"]["options"]["label_smoothing"] == 0.1
    names = {f"train/{name}" for name in TRAIN_METRICS}
    names |= {f"{split}/{name}" for split in ("val", "test") for name in SPLIT_METRICS}
    names |= {"parity/max_ratio", "parity/global_error"}
    followed = {"gradient_ratio", "sum_ratio", "row_ratio", "ranks_differ"}
    names |= {f"parity/{figure}" for figure in followed}
    assert followed | {"trained_ratio"} <= found["parity"].keys()
    for formulation in FORMULATIONS:
        keys = ("loss_error", "grad_error", "ratio", "nonfinite")
        names |= {f"parity/{formulation}/{key}" for key in keys}
        verdict = found["parity"][formulation]
        assert set(verdict) == {*keys, "out_of_domain", "agree"}
    assert set(found["metrics"]) == names
    assert found["parity"]["mass_error"] == 0
    assert found["parity"]["agree"] is True
    assert found["samples"] == {"train_seen": 2300, "val": 288, "test": 359}
    assert found["steps"] == {"taken": 46, "skipped": 0, "zero_mass": 0}
    assert found["world_size"] == 1
    assert found["timing"].keys() == {"startup_s", "train_s", "samples_per_s"}
    assert found["timing"]["train_s"] > 0
    assert found["environment"].keys() == {"versions", "device", "cpu", "threads", "git_commit"}
    assert "error" not in found


def test_metrics_csv_has_every_step(trained: Path) -> None:
    losses = read_metrics(trained, "train/loss")
    assert len(losses) == 46
    assert losses[-1] == Result.read(trained).metrics["train/loss"]
    assert len(read_metrics(trained, "val/nll")) == 2
    assert len(read_metrics(trained, "test/nll")) == 1
    # Steps 0 and the last.
    assert len(read_metrics(trained, "parity/max_ratio")) == 2
    for name in metric_names(FORMULATIONS):
        assert read_metrics(trained, name), f"{name} was never logged"


@pytest.mark.parametrize("epochs", [2, pytest.param(15, marks=slow)])
def test_fused_and_log_softmax_train_to_the_same_bits(epochs: int, tmp_path: Path) -> None:
    """They are the same ATen calls, so float32 on one process cannot tell them apart."""
    weights = {}
    for loss in FORMULATIONS:
        (tmp_path / loss).mkdir()
        options = ("callbacks=quiet", "logger=csv", f"trainer.max_epochs={epochs}")
        run(composed(f"loss={loss}", *options), tmp_path / loss)
        weights[loss] = final_weights(tmp_path / loss)
    for name, weight in weights["cross_entropy"].items():
        assert torch.equal(weight, weights["log_softmax_nll"][name])
    # And the comparison can tell another rounding apart.
    assert any(
        not torch.equal(weight, weights["softmax_nll"][name])
        for name, weight in weights["cross_entropy"].items()
    )


@slow
def test_all_three_end_alike_in_float64(run_here: Run, tmp_path: Path) -> None:
    results = [
        run_here(
            f"loss={loss}",
            "trainer.precision=64-true",
            "trainer.max_epochs=8",
            "parity.policy=raise",
            directory=tmp_path / loss,
        )
        for loss in FORMULATIONS
    ]
    first = results[0].metrics
    for result in results[1:]:
        assert result.metrics["test/acc"] == first["test/acc"]
        # Rounding at 1e-16, amplified by 184 steps of training.
        assert result.metrics["test/loss"] == pytest.approx(first["test/loss"], rel=1e-9)


def test_training_with_another_loss_still_compares_the_three(run_here: Run) -> None:
    result = run_here(
        "loss=custom", "loss.target=torch_like:doubled", "trainer.max_epochs=1", "parity=strict"
    )
    assert result.parity["agree"]
    assert set(FORMULATIONS) <= set(result.parity)
    assert result.metrics["test/loss"] == pytest.approx(2 * result.metrics["test/nll"], rel=1e-6)


def test_test_weights_decide_what_is_tested(run_here: Run, tmp_path: Path) -> None:
    # A learning rate that is far too high at the end makes the last weights the worse ones.
    options = ("trainer.max_epochs=4", "optimizer.lr=0.2", "scheduler=constant")
    best = run_here(*options, directory=tmp_path / "best")
    last = run_here(*options, "test_weights=last", directory=tmp_path / "last")
    history = read_metrics(tmp_path / "best", "val/nll")
    assert history == read_metrics(tmp_path / "last", "val/nll")
    assert best.metrics["val/nll"] == min(history)
    assert last.metrics["val/nll"] == history[-1]


@pytest.mark.parametrize("task", ["validate", "test"])
def test_a_checkpoint_is_evaluated_as_it_was_in_its_run(
    task: str, trained: Path, run_here: Run
) -> None:
    fitted = Result.read(trained)
    again = run_here(*LOSS, f"task={task}", f"ckpt_path={trained}/checkpoints/last.ckpt")
    split = {"validate": "val", "test": "test"}[task]
    assert {f"{split}/{name}" for name in SPLIT_METRICS} == again.metrics.keys()
    assert all(value == fitted.metrics[name] for name, value in again.metrics.items())


def test_a_checkpoint_of_other_classes_or_networks_is_refused(
    run_here: Run, tmp_path: Path
) -> None:
    run_here("trainer.max_steps=1", directory=tmp_path / "fit")
    checkpoint = f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match="trained on 10 classes, the data has 3"):
        run_here("task=test", checkpoint, "data=synthetic", "data.options={num_classes: 3}")
    with pytest.raises(CheckpointError, match="does not fit model 'convnet'"):
        run_here("task=test", checkpoint, "model.options.widths=[8,32]")


def test_max_steps_inside_an_epoch_still_validates_the_last_weights(run_here: Run) -> None:
    result = run_here("trainer.max_steps=30")
    assert result.steps["taken"] == 30
    assert result.metrics["val/nll"] is not None


def test_early_stopping_ends_a_run(run_here: Run) -> None:
    result = run_here(
        "early_stopping.enabled=true",
        "early_stopping.patience=1",
        "early_stopping.min_delta=10",
        "trainer.max_epochs=10",
    )
    assert result.steps["taken"] == 2 * 23


@pytest.mark.parametrize("debug", ["fast", pytest.param("overfit", marks=slow), "profiler"])
def test_debug_configs(debug: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(composed(f"debug={debug}", "callbacks=quiet"), tmp_path)
    assert result.status == "completed"
    if debug == "overfit":
        assert result.metrics["train/loss"] < 0.02
    if debug == "profiler":
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert {event["ph"] for event in events} == {"X"}
        stages = {event["cat"] for event in events}
        wanted = {"data", "forward", "loss", "backward", "optimizer", "logging", "parity"}
        assert wanted <= stages
        table = capsys.readouterr().out
        assert "23 steps: where the time went" in table
        assert all(stage in table for stage in wanted)


@pytest.mark.parametrize(
    "options",
    ["model=mlp optimizer=adamw scheduler=one_cycle", "model.channels_last=true"],
)
def test_shipped_choices_train(options: str, tmp_path: Path) -> None:
    result = run(composed(*options.split(), "trainer.max_epochs=5", "callbacks=quiet"), tmp_path)
    assert result.metrics["test/acc"] > 0.8


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")))
def test_a_shipped_experiment_composes(path: Path) -> None:
    config = composed(f"experiment={path.stem}", "seed=3").config
    assert config.tags == [path.stem]
    assert config.seed == 3


def test_tags_make_no_other_run() -> None:
    assert "tags" in PRESENTATION
    assert composed("tags=[a,b]").config.tags == ["a", "b"]


def test_a_torchvision_network_trains_on_grey_images(tmp_path: Path) -> None:
    config = composed(
        "model=torchvision",
        "model.name=resnet18",
        "data=synthetic",
        "data.options={num_samples: 100, size: 32}",
        "trainer.max_epochs=1",
        "callbacks=quiet",
    )
    assert run(config, tmp_path).status == "completed"


@slow
def test_a_compiled_network_is_the_same_network(run_here: Run, tmp_path: Path) -> None:
    options = (
        "trainer.max_steps=3",
        "trainer.precision=64-true",
        "model=mlp",
        "model.options.widths=[16,16,16]",
        "model.options.dropout=0.1",
    )
    run(composed(*options, "callbacks=quiet"), tmp_path / "eager")
    run(composed(*options, "callbacks=quiet", "model.compile=true"), tmp_path / "compiled")
    eager = read_metrics(tmp_path / "eager", "train/loss")
    # Fused kernels round otherwise.
    assert read_metrics(tmp_path / "compiled", "train/loss") == pytest.approx(eager, rel=1e-12)


def test_a_network_whose_head_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives \[11\] logits per image where the data has 10"):
        run(composed("model=custom", "model.target=stand_ins:too_many_logits"), tmp_path)


def test_targets_that_are_none_are_refused(tmp_path: Path) -> None:
    custom = ("data=custom", "callbacks=quiet")
    with pytest.raises(DataError, match="train target 7 is -1"):
        run(composed(*custom, "data.target=stand_ins:bad_label"), tmp_path)
    soft = composed(*custom, "data.target=stand_ins:soft_targets", "data.options={total: 0.9}")
    with pytest.raises(DataError, match=r"target 0 sums to 0\.9"):
        run(soft, tmp_path)


def test_soft_targets_train(tmp_path: Path) -> None:
    config = composed(
        "data=custom", "data.target=stand_ins:soft_targets", "callbacks=quiet", "parity=strict"
    )
    result = run(config, tmp_path)
    # The entropy of three equal probabilities is as low as the loss can go.
    assert result.metrics["test/nll"] >= torch.tensor(3.0).log().item() - 1e-6  # float32


def test_a_loss_with_parameters_learns_and_saves_them(tmp_path: Path) -> None:
    config = composed(
        "loss=custom",
        "loss.target=torch_like:LearnedTemperature",
        "trainer.max_epochs=1",
        "callbacks=quiet",
    )
    run(config, tmp_path)
    learned = final_weights(tmp_path)["criterion.loss.log_temperature"]
    assert learned.item() != 0


def test_weights_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LossError, match="2 values for 10 classes"):
        run(composed("loss.weight=[1,2]"), tmp_path)


def test_what_a_network_does_is_noted_and_said_where_it_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = (
        *("model=custom", "model.target=stand_ins:batch_norm", "trainer.max_steps=1"),
        "callbacks=quiet",
    )
    result = run(composed(*options), tmp_path / "whole")
    assert [each["effect"] for each in result.network] == ["neighbours", "learns"]
    assert "results depend on" not in caplog.text
    split = (*options, "trainer.micro_batch_size=20")
    run(composed(*split), tmp_path / "split")
    assert "0 (BatchNorm2d) makes a sample's logits depend on the samples beside it" in caplog.text
    with pytest.raises(ConfigError, match=r"^parity\.policy=raise refuses model=custom: 0 \(Batch"):
        run(composed(*split, "parity=strict"), tmp_path / "strict")


@pytest.mark.parametrize(
    ("accelerator", "devices", "model", "synchronised"),
    [
        ("gpu", 2, "resnet18", True),
        ("gpu", 1, "resnet18", False),
        ("gpu", 2, "squeezenet1_1", False),  # no batch norm
        ("cpu", 2, "resnet18", False),
    ],
)
def test_batch_norm_is_synchronised_on_several_gpus(
    accelerator: str,
    devices: int,
    model: str,
    synchronised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Lightning is asked for: there need be no GPU."""

    class AskedError(Exception):
        pass

    def ask(**arguments: object) -> None:
        raise AskedError(arguments["sync_batchnorm"])

    monkeypatch.setattr("equiloss.training.trainer.Trainer", ask)
    config = composed(
        "model=torchvision",
        f"model.name={model}",
        "data=synthetic",
        "data.options={num_samples: 60, size: 32}",
        f"trainer.accelerator={accelerator}",
        f"trainer.devices={devices}",
    )
    with pytest.raises(AskedError) as asked:
        run(config, tmp_path)
    assert asked.value.args == (synchronised,)


@pytest.mark.parametrize(
    "refused",
    [
        "+trainer.profiler=foo",
        "logger=[tensorboard,wandb]",
        "model=custom model.target=stand_ins:batch_norm trainer.reduction=bitwise",
        "loss.weight=[1,2]",
        "parity.formulations=[poly]",
        "task=test ckpt_path=nowhere.ckpt",
    ],
)
def test_what_is_refused_has_opened_nothing_and_removed_nothing(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    config = composed(*refused.split(), "callbacks=quiet")
    left = {"config.yaml": config.text, "metrics.csv": "step\n", "events.out.tfevents.0": "old"}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        run(config, tmp_path)
    (tmp_path / "results.json").unlink(missing_ok=True)  # which says that it failed
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == left


def test_an_event_file_that_cannot_be_written_is_named(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", full)
    with pytest.raises(FileError, match=r"cannot write .*events\.out\.tfevents.*: no space left"):
        run_here("debug=fast")
    assert Result.read(tmp_path / "run").status == "failed"


def test_the_environment_is_left_alone(run_here: Run) -> None:
    """What a job of a multirun leaves there, the ranks of the next one would inherit."""
    before = dict(os.environ)
    assert before["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"  # by Lightning; a run takes it back
    run_here("trainer.max_steps=1", "seed=7")
    after = dict(os.environ) | {"PYTEST_CURRENT_TEST": before["PYTEST_CURRENT_TEST"]}
    assert after == before


def test_a_result_reads_back(tmp_path: Path) -> None:
    written = Result("completed", "0" * 64, {"name": "cross_entropy", "options": {}})
    written.metrics = {"val/nll": float("nan"), "val/acc": 0.1}
    written.write(tmp_path)
    read = Result.read(tmp_path)
    assert read.metrics == {"val/nll": None, "val/acc": 0.1}
    assert read.status == "completed"


def test_criterion_is_what_the_run_reports(run_here: Run) -> None:
    result = run_here("loss=balanced", "trainer.max_steps=1")
    counts = torch.tensor(result.loss["options"]["weight"]).reciprocal()
    assert result.loss["name"] == "cross_entropy"
    assert counts.sum().item() == pytest.approx(10, rel=1e-5)  # float32 reciprocals
    assert (
        Criterion(result.loss["name"], **result.loss["options"]).options == (result.loss["options"])
    )


def test_what_the_metrics_were_made_from_is_kept(trained: Path) -> None:
    result = Result.read(trained)
    kept = json.loads((trained / "evaluation.json").read_text())
    assert kept["class_names"] == [str(digit) for digit in range(10)]
    for split, rows in (("val", 288), ("test", 359)):
        confusion = torch.tensor(kept[split]["confusion"])
        assert confusion.sum() == rows
        assert confusion.trace() / rows == pytest.approx(result.metrics[f"{split}/acc"])
        bins = kept[split]["calibration"]
        gaps = [abs(r - c) for r, c in zip(bins["right"], bins["confidence"], strict=True)]
        assert sum(gaps) / rows == pytest.approx(result.metrics[f"{split}/ece"])
        assert sum(bins["rows"]) == rows


def test_a_group_of_another_size_is_noticed(run_here, monkeypatch) -> None:
    """Ranks that train alone, each believing to be one of several, would log as if together."""
    from equiloss.distributed import collectives

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="the process group has 2 ranks, Lightning counts 1"):
        run_here("debug=fast", "parity=off", "logger=csv")
