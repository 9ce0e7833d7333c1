"""Callbacks of one's own by configuration, and a fit that starts from weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equiloss.errors import CheckpointError, ConfigError
from equiloss.records.results import read_metrics
from equiloss.records.run_dir import METRICS
from equiloss.training import own_callbacks
from support import Run, final_weights


class Counts(Callback):
    """Counts optimizer steps."""

    seen = 0

    def __init__(self, by: int = 1) -> None:
        self.by = by

    def on_train_batch_end(self, *_: Any) -> None:
        Counts.seen += self.by


def test_one_is_called_in_a_run(run_here: Run) -> None:
    Counts.seen = 0
    result = run_here("debug=fast", f"+callbacks.items.mine={{target:'{__name__}:Counts',by:2}}")
    assert Counts.seen == 2 * result.steps["taken"] > 0


LIGHTNING = "lightning.pytorch.callbacks"


class Logs(Callback):
    """Logs a number of its own with each step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("mine/step", trainer.global_step)


@pytest.mark.parametrize(
    ("target", "name"),
    [(f"{LIGHTNING}:LearningRateMonitor", "lr-SGD/pg1"), (f"{__name__}:Logs", "mine/step")],
)
def test_what_one_logs_has_no_column_and_ends_no_run(
    target: str, name: str, run_here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("trainer.max_steps=60", "logger=tensorboard", f"+callbacks.items.mine.target={target}")
    run_here(*words)
    directory = tmp_path / "run"
    columns = (directory / METRICS).read_text().splitlines()[0].split(",")
    assert not {name, "epoch"} & {*columns}
    assert len(read_metrics(directory, "train/loss")) == 60
    (line,) = [each for each in caplog.messages if "has no columns for" in each]
    assert name in line
    events = EventAccumulator(str(directory)).Reload()
    assert events.Scalars(name)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"by": 2}, r"callbacks\.items\.mine needs a target"),
        (3, "needs a target"),
        ({"target": "no_such:thing"}, r"callbacks\.items\.mine\.target=no_such:thing cannot be"),
        ({"target": f"{__name__}:Counts", "bye": 1}, "cannot be made: .*'bye'"),
        ({"target": "math:sqrt", "x": 1}, "cannot be made"),
        ({"target": "builtins:dict"}, "makes no callback"),
        ({"target": f"{LIGHTNING}:BatchSizeFinder"}, "is refused: data.batch_size is global"),
        (
            {"target": f"{LIGHTNING}:GradientAccumulationScheduler", "scheduling": {1: 2}},
            "is refused: set trainer.micro_batch_size",
        ),
        (
            {"target": f"{LIGHTNING}:EMAWeightAveraging"},
            "WeightAveraging is refused: set ema.decay",
        ),
        ({"target": f"{LIGHTNING}:StochasticWeightAveraging", "swa_lrs": 0.1}, "changes the sched"),
    ],
)
def test_what_cannot_be_used_is_named(item: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        own_callbacks.build({"mine": item})


class TestStartingFromWeights:
    SMALL = ("debug=fast", "model.options.widths=[8,16]", "trainer.max_epochs=2")

    def test_the_weights_are_those(self, run_here: Run, tmp_path: Path) -> None:
        run_here(*self.SMALL, directory=tmp_path / "first")
        last = tmp_path / "first" / "checkpoints" / "last.ckpt"
        words = (f"init_from={last}", "optimizer.lr=1e-30", "seed=9", "optimizer.weight_decay=0")
        result = run_here(*self.SMALL, *words, directory=tmp_path / "second")
        before, after = final_weights(tmp_path / "first"), final_weights(tmp_path / "second")
        assert all(torch.equal(before[name], after[name]) for name in before)
        # The schedule is its own.
        assert result.steps["taken"] == 6

    def test_a_head_of_another_size_is_new(
        self, run_here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run_here(*self.SMALL, directory=tmp_path / "first")
        best = tmp_path / "first" / "checkpoints" / "best.ckpt"
        caplog.set_level("INFO")
        run_here(
            *self.SMALL,
            f"init_from={best}",
            "data=synthetic",
            "data.options={num_classes:4,channels:1,size:8}",
            directory=tmp_path / "second",
        )
        (said,) = [line for line in caplog.messages if line.startswith("starting with ")]
        assert "; the head is new (head.weight, head.bias)" in said

    def test_another_network_is_refused(self, run_here: Run, tmp_path: Path) -> None:
        run_here(*self.SMALL, directory=tmp_path / "first")
        best = tmp_path / "first" / "checkpoints" / "best.ckpt"
        with pytest.raises(
            CheckpointError, match=r"does not fit model 'mlp': left out would be 9 of"
        ):
            run_here("debug=fast", "model=mlp", "~model.options.widths", f"init_from={best}")

    def test_only_a_fit_starts_from_weights(self, run_here: Run) -> None:
        with pytest.raises(ConfigError, match="init_from is where task=fit starts from"):
            run_here("init_from=a", "task=test", "ckpt_path=b")

    def test_a_run_that_goes_on_has_its_own(self, run_here: Run, tmp_path: Path) -> None:
        run_here(*self.SMALL, directory=tmp_path / "first")
        last = tmp_path / "first" / "checkpoints" / "last.ckpt"

        # Named by a file that is gone by then.
        gone = tmp_path / "gone.ckpt"
        gone.write_bytes(last.read_bytes())
        words = (*self.SMALL, f"init_from={gone}")
        run_here(*words, directory=tmp_path / "second")
        gone.unlink()
        run_here(*words, directory=tmp_path / "second")
