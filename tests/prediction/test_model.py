"""A trained network on its own: the numbers of the run's own test, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.data.datasets import load as load_data
from equiloss.data.sampler import Slice
from equiloss.distributed.process_groups import run_ranks
from equiloss.errors import CheckpointError, ConfigError, DataError, ModelError
from equiloss.prediction.model import Predictions, checkpoint_of, load
from equiloss.records.results import Result
from equiloss.run import run
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from rank_functions import run_in_rank
from support import composed, slow

FAST = ("callbacks=quiet", "logger=csv", "parity=off", "trainer.max_epochs=2", "trainer.threads=1")


def trained_run(directory: Path, *overrides: str, ranks: int = 1) -> tuple[Result, Tensor, Tensor]:
    """A run's result, and the images and targets of its test split."""
    config = composed(*FAST, *overrides, *([f"trainer.devices={ranks}"] if ranks > 1 else []))
    if ranks == 1:
        run(config, directory)
    else:
        run_ranks(run_in_rank, ranks, config, directory)
    (directory / "config.yaml").write_text(config.text)
    source = load_data(config.config.data).test
    return Result.read(directory), source.read(Slice(0, torch.arange(len(source)))), source.targets


def test_where_the_tested_weights_are_gone_it_is_the_last_that_were_tested(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(composed("test_weights=best").text)
    (tmp_path / "checkpoints").mkdir()
    for name in ("best.ckpt", "last.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    assert checkpoint_of(tmp_path).name == "best.ckpt"
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    (tmp_path / "checkpoints" / "ema.ckpt").touch()
    assert checkpoint_of(tmp_path).name == "last.ckpt"
    (tmp_path / "config.yaml").write_text(composed("test_weights=ema", "ema.decay=0.9").text)
    assert checkpoint_of(tmp_path).name == "ema.ckpt"
    (tmp_path / "checkpoints" / "ema.ckpt").unlink()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    assert checkpoint_of(tmp_path).name == "last.ckpt"


CASES = {
    "convnet": (),
    "mlp, double precision": ("model=mlp", "trainer.precision=64-true"),
    "batch norm": ("model=torchvision", "model.name=resnet18", "data.max_samples=60"),
    "features": ("model=mlp", "loss=linear_cross_entropy"),
    "bf16-mixed": ("model=mlp", "trainer.precision=bf16-mixed"),
    "last": ("model=mlp", "test_weights=last"),
}


@pytest.mark.parametrize(
    "case", [c if c in ("convnet", "last") else pytest.param(c, marks=slow) for c in CASES]
)
def test_predictions_are_the_numbers_of_the_runs_own_test(case: str, tmp_path: Path) -> None:
    result, images, target = trained_run(tmp_path, *CASES[case])
    model = load(tmp_path)
    for batch_size in (1000, 7):
        logits = model.logits(images, batch_size=batch_size)
        assert len(logits) == result.samples["test"]
        found = model.predictions(logits)
        right = int((found.indices == target).sum())
        assert right == round(result.metrics["test/acc"] * len(target))
        nll = float(F.cross_entropy(logits.double(), target))
        tolerance = 2e-2 if "bf16" in case else 1e-5  # other batches round differently
        assert nll == pytest.approx(result.metrics["test/nll"], rel=tolerance)
    assert torch.equal(
        model.predict(images).probabilities, model.predictions(model.logits(images)).probabilities
    )


@slow
def test_a_run_on_two_ranks_predicts_alike(tmp_path: Path) -> None:
    result, images, target = trained_run(tmp_path, "model=mlp", "trainer=ddp_cpu", ranks=2)
    right = int((load(tmp_path).predict(images).indices == target).sum())
    assert right == round(result.metrics["test/acc"] * len(target))


def mine(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    trained_run(place, "model=mlp", "trainer.max_epochs=1")
    return place


def test_loading_draws_no_random_number(trained: Path) -> None:
    before = torch.get_rng_state()
    load(trained)
    assert torch.equal(torch.get_rng_state(), before)


def test_files_are_read_a_batch_at_a_time(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(trained)
    seen: list[str] = []

    def read(file: Path, **_: Any) -> Tensor:
        seen.append(str(file))
        return torch.zeros(1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(model, "read", read)
    model.network.register_forward_pre_hook(lambda *_: seen.append("|"))
    assert len(model.predict(["a", "b", "c"], batch_size=2).labels) == 3
    assert seen == ["a", "b", "|", "c", "|"]
    for one in ("one.png", Path("one.png")):
        seen.clear()
        assert len(model.predict(one).labels) == 1
        assert seen == ["one.png", "|"]


class TestRefused:
    def changed(self, trained: Path, place: Path, **changes: Any) -> Path:
        """The run's checkpoint with another description."""
        io = AtomicCheckpointIO()
        checkpoint = io.load_checkpoint(trained / "checkpoints" / "best.ckpt")
        checkpoint["equiloss"]["about"] |= changes
        io.save_checkpoint(checkpoint, place / "changed.ckpt")
        return place / "changed.ckpt"

    def test_images_of_another_shape_or_type(self, trained: Path) -> None:
        model = load(trained)
        with pytest.raises(DataError, match=r"images are \[1, 9, 9\].* trained on \[1, 8, 8\]"):
            model.predict(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))
        with pytest.raises(DataError, match=r"must be torch\.uint8"):
            model.predict(torch.zeros(2, 1, 8, 8))
        assert model.predict(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)).labels == []
        assert model.predict([]).probabilities.shape == (0, 10)

    def test_directories_and_files_without_a_checkpoint(
        self, trained: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match="no directory of a run"):
            load(tmp_path)
        (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load(tmp_path / "other.ckpt")

    def test_weights_of_another_network(self, trained: Path, tmp_path: Path) -> None:
        other = {"name": "mlp", "target": None, "options": {"widths": [5]}}
        with pytest.raises(CheckpointError, match="does not fit the network that it names"):
            load(self.changed(trained, tmp_path, model=other))
        other["options"] = {"widths": [-4]}
        with pytest.raises(ModelError, match=r"model 'mlp' with options .*negative dimension -4"):
            load(self.changed(trained, tmp_path, model=other))

    @pytest.mark.parametrize(
        ("device", "line"),
        [
            ("hpu", "device=hpu cannot be had: "),  # whose module torch imports
            ("meta", "device=meta computes no numbers"),
        ],
    )
    def test_devices_that_are_not_there(self, trained: Path, device: str, line: str) -> None:
        with pytest.raises(ConfigError, match=line):
            load(trained, device=device)

    def test_a_description_of_another_form(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="of another version"):
            load(self.changed(trained, tmp_path, mean="none"))
        for changes, named in (
            ({"image_shape": [8, 8]}, "image_shape, mean, std"),
            ({"image_shape": [1, -8, 8]}, "image_shape"),
            ({"mean": [0.5] * 3}, "mean"),
            ({"std": []}, "std"),
            ({"range": [0.0]}, "range"),
            ({"precision": "31-true"}, "precision"),
            ({"model": {"name": "mlp", "target": None, "options": {}, "depth": 3}}, "model"),
            ({"model": {"name": "mlp", "target": None, "options": []}}, "model"),
        ):
            with pytest.raises(CheckpointError, match=f"its {named} cannot be read"):
                load(self.changed(trained, tmp_path, **changes))
        io = AtomicCheckpointIO()
        checkpoint = io.load_checkpoint(trained / "checkpoints" / "best.ckpt")
        for state in ({1: torch.zeros(1)}, None):
            checkpoint["state_dict"] = state
            io.save_checkpoint(checkpoint, tmp_path / "bare.ckpt")
            with pytest.raises(CheckpointError, match=r"bare\.ckpt holds no weights"):
                load(tmp_path / "bare.ckpt")
        del checkpoint["equiloss"]["about"]
        io.save_checkpoint(checkpoint, tmp_path / "old.ckpt")
        with pytest.raises(CheckpointError, match="did not say what its weights are for"):
            load(tmp_path / "old.ckpt")

    def test_code_that_a_checkpoint_names_is_run_for_those_who_ask(
        self, trained: Path, tmp_path: Path
    ) -> None:
        named = {"name": "custom", "target": "os:_exit", "options": {}}
        with pytest.raises(
            CheckpointError, match=r"names the code os:_exit: if you .*--target os:"
        ):
            load(self.changed(trained, tmp_path, model=named))
        line = "names no code: give no target"
        with pytest.raises(CheckpointError, match=line):
            load(trained, target="os:_exit")
        target = f"{__name__}:mine"
        result, images, truth = trained_run(
            tmp_path / "own", "model=custom", f"model.target={target}"
        )
        right = int((load(tmp_path / "own", target=target).predict(images).indices == truth).sum())
        assert right == round(result.metrics["test/acc"] * len(truth))


def test_the_most_probable_come_first() -> None:
    found = Predictions(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), ("a", "b", "c"))
    assert found.labels == ["b", "a"]
    assert [[name for name, _ in row] for row in found.top(2)] == [["b", "c"], ["a", "b"]]
