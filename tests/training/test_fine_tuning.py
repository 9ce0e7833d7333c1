"""Runs with frozen parts and rates by group: what stays, what is said, and the same numbers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import UserError
from equiloss.invariance.interruption import bits, count_differing
from equiloss.records.results import Result, read_metrics
from equiloss.run import run
from equiloss.training.classifier import Classifier
from processes import until_it_trains
from rank_functions import run_in_rank, run_until_out_of_time
from stops import StopBefore, StopError
from support import PYTHONPATH, ROOT, composed, final_weights, slow

# 38 training rows in batches of 9: five steps an epoch, the last one of 2 rows.
SMALL = (
    *("callbacks=quiet", "logger=csv", "trainer.threads=1", "trainer.precision=64-true"),
    *("data=synthetic", "data.options={num_samples: 60}", "data.batch_size=9"),
    *("model=custom", "model.target=stand_ins:normalised", "optimizer=adamw"),
    *("trainer.max_epochs=3", "parity.every_n_steps=1", "parity.policy=raise"),
    "checkpoint.every_n_steps=1",
)
FROZEN = ("model.freeze=backbone",)
UNFROZEN = (
    *FROZEN,
    *("model.unfreeze_after_epochs=1", "ema.decay=0.9"),
    "optimizer.groups=[{pattern:stages,lr_factor:0.1},{pattern:stem,lr_factor:0.01,weight_decay:0}]",
)


class Watched(Callback):
    """Keeps the network's state at the first step and after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.with_gradient: list[str] = []
        self.optimizer: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        self._note(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:  # type: ignore[override]
        model = pl_module.model
        self.with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        self._note(pl_module)
        self.optimizer = pl_module.the_optimizer.state_dict()

    def _note(self, module: Classifier) -> None:
        state = module.model.state_dict()
        self.states.append({name: tensor.clone() for name, tensor in state.items()})

    def changed(self, since: int, until: int) -> set[str]:
        """Tensors that are not the same bits at two of these moments."""
        pairs = zip(*(self.states[moment].items() for moment in (since, until)), strict=True)
        return {name for (name, before), (_, after) in pairs if not torch.equal(before, after)}


# Float64 rounds at 1e-16, in sums of another order. Training amplifies it: AdamW divides a gradient
# by its own size, so that one that is small, and rounds as much, moves a weight as far.
ROUNDING = 1e-11
HEAD = {"head.weight", "head.bias"}
FILTERS = {"stem.weight", "stages.0.conv.weight", "stages.1.conv.weight"}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Whole(NamedTuple):
    """A run that nothing stopped."""

    directory: Path
    result: Result
    watched: Watched
    lines: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory, watched, handler = tmp_path_factory.mktemp("whole"), Watched(), Lines()
    logger = logging.getLogger("equiloss")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        result = run(composed(*SMALL, *UNFROZEN), directory, callbacks=[watched])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return Whole(directory, result, watched, handler.lines)


def test_what_is_frozen_keeps_its_bits_until_it_learns(whole: Whole) -> None:
    """Weights and statistics; those of batch norm for the whole run."""
    watched = whole.watched
    assert watched.changed(0, 1) == HEAD
    assert watched.changed(1, 2) == watched.changed(0, -1) == HEAD | FILTERS
    assert whole.result.parity["agree"]


@slow
def test_what_never_learns_has_no_gradient_and_no_place_in_the_optimizer(tmp_path: Path) -> None:
    watched = Watched()
    run(composed(*SMALL, *FROZEN), tmp_path, callbacks=[watched])
    assert watched.changed(0, -1) == HEAD
    assert watched.with_gradient == ["head.weight", "head.bias"]
    assert len(watched.optimizer["state"]) == 2
    assert sum(len(group["params"]) for group in watched.optimizer["param_groups"]) == 2
    # Not of this test alone: batch norm that trains changes all.
    plain = Watched()
    run(composed(*SMALL), tmp_path / "plain", callbacks=[plain])
    assert plain.changed(0, -1) == set(plain.states[0])


def test_the_log_says_what_learns_and_at_which_rates(whole: Whole) -> None:
    named = ("model.freeze", "optimizer.groups")
    assert [line for line in whole.lines if line.startswith(named)] == [
        "model.freeze=backbone: 90 of 1,362 parameters learn (head), the others after 1 epoch; "
        "frozen batch normalisation (4 layers) evaluates, for the whole run",
        "optimizer.groups: the others: 90 parameters, lr 0.003, decay 0.01 (0 of norms and biases)",
        "optimizer.groups: stages: 1,152 parameters, lr 0.0003, decay 0.01 (0 of norms and biases)",
        "optimizer.groups: stem: 72 parameters, lr 3e-05, decay 0",
        "model.freeze=backbone: 1,314 of 1,362 parameters learn (all but frozen batch "
        "normalisation); frozen batch normalisation (4 layers) evaluates, for the whole run",
    ]
    # The rate that is logged is the optimizer's own.
    assert max(read_metrics(whole.directory, "train/lr")) == pytest.approx(0.003)


# Inside an epoch that is not frozen, inside the one that is, and between the two.
@pytest.mark.parametrize("step", [7, 3, pytest.param(5, marks=slow)])
def test_a_run_that_was_stopped_unfreezes_to_the_bit(
    step: int, whole: Whole, tmp_path: Path
) -> None:
    config = composed(*SMALL, *UNFROZEN)
    with pytest.raises(StopError):
        run(config, tmp_path, callbacks=[StopBefore(step)])
    assert run(config, tmp_path).segments[-1]["from_step"] == step
    assert set(bits(tmp_path, whole.directory).values()) == {0}


def test_two_ranks_and_micro_batches_give_the_same_weights(whole: Whole, tmp_path: Path) -> None:
    """Before and after it unfreezes; the slow test below does so with a network of torchvision."""
    two = ("trainer=ddp_cpu", "trainer.devices=2", "trainer.micro_batch_size=3")
    run_ranks(run_in_rank, 2, composed(*SMALL, *UNFROZEN, *two), tmp_path)
    assert Result.read(tmp_path).world_size == 2
    for file in ("last.ckpt", "ema.ckpt"):
        expected = final_weights(whole.directory, file)
        for name, value in final_weights(tmp_path, file).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING)


@slow
def test_a_run_that_ends_before_it_unfreezes_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(composed(*SMALL, *FROZEN, "model.unfreeze_after_epochs=3"), tmp_path)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    line = "model.unfreeze_after_epochs=3: the run ends before, after 15 steps of 5 an epoch"
    assert line in warned


def test_a_pattern_that_matches_nothing_ends_a_run_before_its_first_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown parameters in optimizer\.groups\[0\]\.pattern"):
        run(composed(*SMALL, "optimizer.groups=[{pattern:haed}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Nine epochs of seven steps with batch norm, the first three of the head alone; 2 rows at the end.
RESNET = (
    *("callbacks=quiet", "logger=csv", "trainer.threads=1", "trainer.precision=64-true"),
    *("data=image_folder", "data.image_size=64", "data.num_workers=0", "data.batch_size=9"),
    *("model=torchvision", "model.name=resnet18", "optimizer.lr=0.01", "trainer.max_epochs=9"),
    *("model.freeze=backbone", "model.unfreeze_after_epochs=3", "ema.decay=0.9"),
    "optimizer.groups=[{pattern:layer?,lr_factor:0.1},{pattern:[conv1,bn1],lr_factor:0.01}]",
    *("parity.every_n_steps=10", "parity.policy=raise", "test_weights=ema"),
)


@pytest.fixture
def of_pictures(tmp_path: Path) -> tuple[str, ...]:
    """Stripes of two directions in files, and weights of a thousand classes."""
    generator = torch.Generator().manual_seed(0)
    for label, axis in (("across", 0), ("down", 1)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(40):
            stripes = (torch.arange(64) // 8 % 2 * 90 + 60).expand(64, 64)
            noisy = stripes + torch.randint(0, 90, (64, 64), generator=generator)
            pixels = (noisy if axis else noisy.T).to(torch.uint8)
            file = tmp_path / "pictures" / label / f"{number}.png"
            Image.fromarray(pixels.numpy()).convert("RGB").save(file)
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    place = f"data.root={tmp_path}/pictures"
    return *RESNET, place, f"model.weights={tmp_path}/resnet18.pth"


@slow
def test_devices_and_micro_batches_give_the_same_weights(
    of_pictures: tuple[str, ...], tmp_path: Path
) -> None:
    """Pictures, weights from a file, what is frozen for a while, rates by layer, and averages."""
    whole = run(composed(*of_pictures), tmp_path / "one")
    assert (whole.steps["taken"], whole.parity["agree"]) == (63, True)
    run(composed(*of_pictures, "trainer.micro_batch_size=4"), tmp_path / "micro")
    two = ("trainer=ddp_cpu", "trainer.devices=2")
    run_ranks(run_in_rank, 2, composed(*of_pictures, *two), tmp_path / "two")
    both = composed(*of_pictures, *two, "trainer.micro_batch_size=3")
    run_ranks(run_in_rank, 2, both, tmp_path / "both")
    for name in ("micro", "two", "both"):
        assert Result.read(tmp_path / name).parity["agree"]
        for file in ("last.ckpt", "ema.ckpt"):
            expected = final_weights(tmp_path / "one", file)
            for key, value in final_weights(tmp_path / name, file).items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=ROUNDING)


@slow
def test_a_run_that_was_killed_goes_on_to_the_bit(
    of_pictures: tuple[str, ...], tmp_path: Path
) -> None:
    run(composed(*of_pictures), tmp_path / "whole")
    each_step = (*of_pictures, "checkpoint.every_n_steps=1", f"hydra.run.dir={tmp_path}/cut")
    command = [sys.executable, str(ROOT / "train.py"), *each_step]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    until_it_trains(process, tmp_path / "cut", rows=30)
    process.kill()
    process.wait()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    begun = Result.read(tmp_path / "cut").segments[-1]["from_step"]
    assert 10 <= begun < 63, again.stdout
    assert set(bits(tmp_path / "cut", tmp_path / "whole").values()) == {0}
    averages = (final_weights(tmp_path / name, "ema.ckpt") for name in ("cut", "whole"))
    assert count_differing(*averages) == 0


@slow
def test_three_ranks_that_were_stopped_unfreeze_to_the_bit(whole: Whole, tmp_path: Path) -> None:
    """With three, the place of a parameter in a bucket decides how its gradient rounds."""
    devices = ("trainer=ddp_cpu", "trainer.devices=3")
    run_ranks(run_in_rank, 3, composed(*SMALL, *UNFROZEN, *devices), tmp_path / "whole")
    limited = composed(*SMALL, *UNFROZEN, *devices, "trainer.max_time=00:00:00:00")
    for _ in range(7):
        run_ranks(run_until_out_of_time, 3, limited, tmp_path / "cut")
    run_ranks(run_in_rank, 3, composed(*SMALL, *UNFROZEN, *devices), tmp_path / "cut")
    starts = [part["from_step"] for part in Result.read(tmp_path / "cut").segments]
    assert starts == list(range(8))
    assert set(bits(tmp_path / "cut", tmp_path / "whole").values()) == {0}
    expected = final_weights(whole.directory)
    for name, value in final_weights(tmp_path / "whole").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING)


@slow
def test_bitwise_steps_are_the_same_bits_before_and_after(tmp_path: Path) -> None:
    """A network without batch norm, which the bitwise reduction asks for."""
    options = (
        *("callbacks=quiet", "logger=csv", "trainer.reduction=bitwise", "optimizer=adamw"),
        *("data.max_samples=60", "data.batch_size=9", "trainer.max_epochs=3"),
        *("model.options.widths=[8,16]", "model.freeze=all_but_last:2", "parity.every_n_steps=2"),
        *("model.unfreeze_after_epochs=1", "optimizer.groups=[{pattern:stages,lr_factor:0.1}]"),
    )
    watched = Watched()
    result = run(composed(*options), tmp_path / "one", callbacks=[watched])
    assert result.parity["agree"]
    assert watched.changed(0, 1) == HEAD | {"stages.12.weight", "stages.12.bias"}
    assert watched.changed(1, 2) == set(watched.states[0])
    several = composed(*options, "trainer=ddp_cpu", "trainer.devices=2")
    run_ranks(run_in_rank, 2, several, tmp_path / "two")
    assert Result.read(tmp_path / "two").parity["agree"]
    expected = final_weights(tmp_path / "one")
    for name, value in final_weights(tmp_path / "two").items():
        assert torch.equal(value, expected[name]), name
