"""Exported files are the network that was trained, or they are rejected."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.errors import CheckpointError, UserError
from equiloss.prediction import certificate
from equiloss.prediction import export as exporting
from equiloss.prediction.certificate import certify
from equiloss.prediction.model import TrainedModel, load
from equiloss.run import run
from support import composed, slow, wrong_with

FAST = ("callbacks=quiet", "logger=csv", "parity=off", "trainer.max_epochs=2", "trainer.threads=1")
FORMATS = ["onnx", pytest.param("torch-export", marks=slow)]  # loaded in another process


def train(place: Path, *overrides: str) -> Path:
    config = composed(*FAST, *overrides)
    run(config, place)
    (place / "config.yaml").write_text(config.text)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("exported") / "run", "model=mlp")


@pytest.fixture(scope="module")
def split(trained: Path) -> tuple[Tensor, Tensor]:
    return certificate.test_split(load(trained).path)


def called(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.stdout, done.stderr


NETWORKS = {
    "mlp": ("model=mlp",),
    "convnet": (),
    "batch norm": ("model=torchvision", "model.name=resnet18", "data.max_samples=60"),
    "features": ("model=mlp", "loss=linear_cross_entropy"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "network", ["mlp", *(pytest.param(n, marks=slow) for n in [*NETWORKS][1:])]
)
def test_a_file_is_certified(network: str, kind: str, tmp_path: Path) -> None:
    place = train(tmp_path / "run", *NETWORKS[network])
    file = tmp_path / f"model{exporting.FORMATS[kind]}"
    code, output, errors = called("export", place, "--format", kind, "--output", file)
    assert (code, errors) == (0, "")
    assert output.startswith(f"{file}: certified: ")
    said = json.loads((tmp_path / "certificate.json").read_text())
    assert said["holds"]
    assert said["error"] <= said["bound"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", file.name, "certificate.json"}
    model = load(place)
    images, _ = certificate.test_split(model.path)
    assert said["rows"] == len(images)
    # Any number of rows, as a user would call it.
    call = exporting.loaded(kind, file)
    for rows in (1, 3, len(images)):
        given = call(images[:rows])
        assert given.shape == (rows, len(model.classes))
        torch.testing.assert_close(given, model.logits(images[:rows]), rtol=1e-4, atol=1e-4)
    assert exporting.classes_of(kind, file) == list(model.classes)


def test_probabilities_come_first_and_add_up(trained: Path, split, tmp_path: Path) -> None:
    import onnxruntime

    model = load(trained)
    exporting.export(model, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    probabilities, logits = session.run(None, {"images": split[0][:5].numpy()})
    assert probabilities.sum(-1) == pytest.approx([1] * 5, abs=1e-6)
    assert torch.from_numpy(logits).softmax(-1).numpy() == pytest.approx(probabilities, abs=1e-6)


def a_weight(model: TrainedModel) -> None:
    with torch.no_grad():
        next(model.network.parameters())[0] += 0.05


def the_mean(model: TrainedModel) -> None:
    model.statistics = (model.statistics[0] + 3, model.statistics[1])


def the_range(model: TrainedModel) -> None:
    model.statistics = tuple(part / 255 for part in model.statistics)  # for pixels in [0, 1]


def the_order_of_logits(model: TrainedModel) -> None:
    head = [module for module in model.network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        for part in (head.weight, head.bias):
            part[[0, 1]] = part[[1, 0]]


def the_names_of_classes(model: TrainedModel) -> None:
    model.classes = (*model.classes[1:], model.classes[0])


TAMPERED = (a_weight, the_mean, the_range, the_order_of_logits, the_names_of_classes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("change", TAMPERED)
def test_a_file_that_was_changed_is_rejected(
    change: Callable[[TrainedModel], None],
    kind: str,
    trained: Path,
    split: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    changed = load(trained)
    change(changed)
    file = tmp_path / f"model{exporting.FORMATS[kind]}"
    exporting.export(changed, kind, file)
    found = certify(load(trained), kind, file, *split)
    assert not found.holds
    assert "rejected" in found.describe()


def test_a_rejected_file_keeps_that_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.export

    def wrong(model: TrainedModel, kind: str, place: Path) -> None:
        a_weight(model)
        real(model, kind, place)

    # Only the file is wrong: the checkpoint is read anew.
    monkeypatch.setattr(exporting, "export", wrong)
    monkeypatch.setattr(certificate, "certify", lambda _, *rest: certify(load(trained), *rest))
    code, output, _ = called("export", trained, "--output", tmp_path / "model.onnx")
    assert code == 1
    assert ".onnx.rejected: rejected: 359 test images" in output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.onnx.rejected", "certificate.json"}
    assert not json.loads((tmp_path / "certificate.json").read_text())["holds"]


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["--format", "tflite"], "unknown --format 'tflite'. Known: onnx, torch-export"),
            (
                ["--output", "model.pt2"],
                "--output=model.pt2 is a file of --format=onnx: it ends in",
            ),
            (["--output", "no/such/directory/model.onnx"], "no/such/directory"),
        ],
    )
    def test_wrong_words_are_one_line(self, trained: Path, words: list[str], line: str) -> None:
        code, output, errors = called("export", trained, *words)
        assert (code, output) == (1, "")
        (said,) = errors.splitlines()
        assert line in said
        assert wrong_with(said) is None

    def test_packages_that_are_not_installed(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        code, _, errors = called("export", trained)
        assert code == 1
        assert "--format=onnx needs onnxruntime: pip install 'equiloss[export]'" in errors

    def test_another_precision(self, tmp_path: Path) -> None:
        place = train(tmp_path / "run", "model=mlp", "trainer.precision=64-true", "debug=fast")
        with pytest.raises(UserError, match="was trained in 64-true: exports are of 32-true"):
            exporting.check_export(load(place), "torch-export")

    def test_a_checkpoint_away_from_its_run(self, trained: Path, tmp_path: Path) -> None:
        moved = tmp_path / "best.ckpt"
        moved.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
        with pytest.raises(CheckpointError, match="its test split is not known"):
            certificate.test_split(moved)
