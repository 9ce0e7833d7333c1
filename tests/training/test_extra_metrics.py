"""Metrics by configuration: torchmetrics' own numbers, on any number of ranks."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torchmetrics.functional.classification as functional
from torch import Tensor
from torchmetrics import Metric

from equiloss.config import Config
from equiloss.config import metrics as metrics_config
from equiloss.config.metrics import MetricsConfig, with_modes
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import ConfigError
from equiloss.training.extra_metrics import ExtraMetrics
from rank_functions import extra_metrics_of
from support import Run, composed, wrong_with

EXTRA = with_modes(
    {
        "f1": "F1Score",
        "auroc": {"name": "AUROC", "average": "weighted"},
        "kappa": "CohenKappa",
        "batches": {"target": f"{__name__}:Batches"},
    }
)


class Batches(Metric):
    """The sum of the batches' accuracies: no sum over rows, and no ratio of sums over ranks."""

    def __init__(self, num_classes: int, fails_after: int = 10**6) -> None:
        super().__init__()
        self.fails_after = fails_after
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("seen", torch.zeros(()), "sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        if self.seen >= self.fails_after:
            raise RuntimeError("cannot go on")
        self.total += (probabilities.argmax(-1) == target).float().mean()
        self.seen += 1

    def compute(self) -> Tensor:
        return self.total


def batches() -> list[tuple[Tensor, Tensor]]:
    """Probabilities and classes of batches of 7, 7 and 2 rows."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(16, 4, generator=generator)
    target = torch.randint(0, 4, (16,), generator=generator)
    return [*zip(logits.softmax(-1).split(7), target.split(7), strict=True)]


def test_one_device_gives_the_numbers_of_the_functions() -> None:
    probabilities, target = map(torch.cat, zip(*batches(), strict=True))
    got = extra_metrics_of(EXTRA, batches())
    assert got["f1"] == pytest.approx(
        float(functional.multiclass_f1_score(probabilities, target, 4, average="macro"))
    )
    assert got["auroc"] == pytest.approx(
        float(functional.multiclass_auroc(probabilities, target, 4, average="weighted"))
    )
    assert got["kappa"] == pytest.approx(
        float(functional.multiclass_cohen_kappa(probabilities, target, 4))
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_very_numbers_of_one_device(world_size: int) -> None:
    """Also where a rank has no row of a batch, as the third has of the last."""
    alone = extra_metrics_of(EXTRA, batches())
    for values in run_ranks(extra_metrics_of, world_size, EXTRA, batches()):
        assert values == alone


def test_what_fails_is_not_measured_and_the_rest_is(caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "f1": {"name": "F1Score"},
        "mine": {"target": f"{__name__}:Batches", "fails_after": 2},
    }
    with caplog.at_level(logging.WARNING):
        metrics = ExtraMetrics(extra, 4)
        for _ in range(2):
            for batch in batches():
                metrics.update(*batch)
            values = metrics.take()
            assert math.isnan(values["mine"])
            assert values["f1"] > 0
    assert caplog.messages == ["metrics.extra.mine cannot be measured: cannot go on"] * 2
    assert math.isnan(metrics.take()["f1"])  # nothing was added since


def test_a_row_of_nan_is_no_prediction_of_the_first_class(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = ExtraMetrics({"a": {"name": "Accuracy", "average": "micro"}}, 3)
    target = torch.tensor([0, 0, 1, 2])
    metrics.update(torch.full((4, 3), math.nan), target)
    assert math.isnan(metrics.take()["a"])
    assert caplog.messages == [
        "metrics.extra.a cannot be measured: the probabilities of some rows are NaN"
    ]
    metrics.update(torch.eye(3)[target], target)  # of the next evaluation
    assert metrics.take()["a"] == 1


def test_torchmetrics_is_imported_without_the_second_that_scipy_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(metrics_config, "import_torchmetrics", lambda: seen.append(True))
    with_modes({"f1": "F1Score"})
    assert seen == [True]


def test_a_name_alone_does_not_say_which_end_is_better() -> None:
    """`resolve` writes out what torchmetrics knows; whoever did not must say it."""
    extra = MetricsConfig({"f1": "F1Score"})
    with pytest.raises(
        ConfigError, match=r"val/f1 is watched, and .*: set metrics\.extra\.f1\.mode"
    ):
        Config(loss={"name": "focal"}, metrics=extra, objective="val/f1")


def test_a_run_logs_them_and_keeps_the_best(run_here: Run) -> None:
    result = run_here(
        *("debug=fast", "metrics.extra.f1=F1Score", "checkpoint.monitor=val/f1"),
        *("+metrics.extra.hamming={name:HammingDistance,average:micro}", "objective=val/hamming"),
    )
    assert result.metrics["val/hamming"] == pytest.approx(1 - result.metrics["val/acc"])
    assert 0 < result.metrics["test/f1"] < 1


def test_the_better_end_follows_from_the_metric() -> None:
    watched = ("metrics.extra.f1=F1Score", "early_stopping.monitor=val/f1")
    config: Config = composed(*watched, "checkpoint.monitor=val/ece").config
    assert config.early_stopping.mode == "max"
    assert config.checkpoint.mode == "min"
    hamming = ("metrics.extra.h=HammingDistance", "checkpoint.monitor=val/h")
    assert composed(*hamming).config.checkpoint.mode == "min"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metrics.extra.f1=F1Scor"], "unknown metrics.extra.f1 'F1Scor'. Did you mean 'F1Score'?"),
        (["metrics.extra.acc=Accuracy"], "metrics.extra.acc: every run has a metric of that name"),
        (["metrics.extra.f1=3"], "metrics.extra.f1 needs a name of torchmetrics'"),
        (["metrics.extra.x={}"], "metrics.extra.x needs a name of torchmetrics'"),
        (["metrics.extra={a-b:F1Score}"], "a-b: a metric's name is letters, digits and _"),
        (["metrics.extra.x={name:F1Score,mode:up}"], "unknown metrics.extra.x.mode 'up'"),
        (["metrics.extra.x=Specificity", "objective=val/x"], "set metrics.extra.x.mode=min or max"),
        (
            ["metrics.extra.x=F1Score", "checkpoint.monitor=val/x", "checkpoint.mode=min"],
            "checkpoint.mode=min would keep the worst val/x: it is max",
        ),
        (["checkpoint.monitor=val/f1"], "unknown checkpoint.monitor 'val/f1'"),
    ],
)
def test_a_wrong_configuration_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(*overrides)
    assert words in str(error.value)
    assert wrong_with(f"error: {error.value}") is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "F1Score", "avg": "micro"}, "m: F1Score cannot be made: .*avg"),
        ({"name": "F1Score", "average": "none"}, r"m: F1Score gives \[4\] numbers"),
        ({"name": "ROC"}, "m: ROC gives no tensor"),
        ({"target": "no_such:Metric"}, r"m\.target=no_such:Metric cannot be imported"),
        ({"target": "builtins:dict"}, "m: builtins:dict makes no metric"),
        ({"target": f"{__name__}:Batches", "fails_after": 0}, "Batches fails: cannot go on"),
    ],
)
def test_what_is_no_metric_is_refused_before_training(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExtraMetrics({"m": entry}, 4)
