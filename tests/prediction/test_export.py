"""Exported files are the network that was trained, or they are rejected."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.errors import CheckpointError, ConfigError, UserError
from equiloss.prediction import certificate
from equiloss.prediction import export as exporting
from equiloss.prediction.certificate import certify
from equiloss.prediction.model import TrainedModel, load
from equiloss.records.reading import read_json
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
    said = read_json(tmp_path / "certificate.json")[file.name]
    assert said["holds"]
    assert said["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["error"] <= said["bound"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", file.name, "certificate.json"}
    model = load(place)
    images, _ = certificate.test_split(model.path)
    assert said["rows"] == len(images)
    # Any number of rows, as a user would call it.
    call = exporting.loaded(kind, file)
    for rows in (1, 3, len(images)):
        _, given = call(images[:rows])
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
@pytest.mark.parametrize(
    "change", [TAMPERED[0], *(pytest.param(change, marks=slow) for change in TAMPERED[1:])]
)
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


@slow  # an export takes seconds
def test_a_rejected_file_keeps_that_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.export

    def wrong(model: TrainedModel, kind: str, place: Path) -> None:
        a_weight(model)
        real(model, kind, place)

    words = ("export", trained, "--output", tmp_path / "model.onnx")
    assert called(*words)[0] == 0
    # Only the file is wrong: the checkpoint is read anew.
    monkeypatch.setattr(exporting, "export", wrong)
    monkeypatch.setattr(
        certificate, "certify", lambda _, *rest, **name: certify(load(trained), *rest, **name)
    )
    code, output, _ = called(*words)
    assert code == 1
    assert ".onnx.rejected: rejected: 359 test images" in output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.onnx", "model.onnx.rejected", "certificate.json"}
    # The file that was certified before is still there, and still certified.
    said = read_json(tmp_path / "certificate.json")
    assert {name: each["holds"] for name, each in said.items()} == {
        "model.onnx": True,
        "model.onnx.rejected": False,
    }
    for name, each in said.items():
        assert each["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@slow  # an export takes seconds
def test_figures_that_are_not_finite_are_null(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*words: Any, **name: Any) -> certificate.Certificate:
        return replace(certify(*words, **name), error=math.inf)

    monkeypatch.setattr(certificate, "certify", endless)
    assert called("export", trained, "--output", tmp_path / "model.onnx")[0] == 1
    said = read_json(tmp_path / "certificate.json")["model.onnx.rejected"]  # refuses Infinity
    assert said["error"] is None


def test_logits_beyond_float32_certify_nothing(
    trained: Path, split: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = load(trained)
    head = [module for module in model.network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight[0] = 3e38
    exporting.export(model, "onnx", tmp_path / "model.onnx")
    found = certify(model, "onnx", tmp_path / "model.onnx", *split)
    assert found.error == found.own_error == found.bound == math.inf
    assert not found.holds
    assert not replace(found, softmax_error=0.0).holds  # which says nothing of it


@pytest.mark.parametrize("kind", FORMATS)
def test_probabilities_that_are_not_of_the_logits_are_rejected(
    kind: str,
    trained: Path,
    split: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def warmer(self: exporting.Deployed, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(exporting.normalise(images, self.mean, self.std))
        return (logits / 1.01).softmax(-1), logits

    monkeypatch.setattr(exporting.Deployed, "forward", warmer)
    model = load(trained)
    exporting.export(model, kind, tmp_path / "model")
    found = certify(model, kind, tmp_path / "model", *split)
    assert found.error <= found.bound
    assert not found.holds
    assert "off its logits' softmax" in found.describe()


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["--format", "tflite"], "unknown --format 'tflite'. Known: onnx, torch-export"),
            (
                ["--output", "model.pt2"],
                "--output=model.pt2 must end in .onnx, for --format=onnx",
            ),
            (["--output", "no/such/model.onnx"], "there is no directory no/such"),
            (["--output", f"{__file__}/model.onnx"], f"there is no directory {__file__}"),
            (["--output", "{tmp_path}/here.onnx"], "here.onnx is a directory: name a file"),
            (["--output", "{tmp_path}/model.onnx"], "is no mapping of files to certificates"),
        ],
    )
    def test_wrong_words_are_one_line(self, tmp_path: Path, words: list[str], line: str) -> None:
        (tmp_path / "here.onnx").mkdir()
        (tmp_path / "certificate.json").write_text('{"holds": true}')
        given = [word.format(tmp_path=tmp_path) for word in words]
        code, output, errors = called("export", "no/such/run", *given)  # before it is looked for
        assert (code, output) == (1, "")
        (said,) = errors.splitlines()
        assert line in said
        assert wrong_with(said) is None

    @slow
    def test_a_directory_that_is_gone_after_the_work(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()

        def replaced(path: Path) -> tuple[Tensor, Tensor]:
            (tmp_path / "out").rmdir()
            (tmp_path / "out").write_text("a file")
            return torch.zeros(0), torch.zeros(0)

        monkeypatch.setattr(certificate, "test_split", replaced)
        code, _, errors = called("export", trained, "--output", tmp_path / "out" / "model.onnx")
        why = "not a directory: name another file with --output"
        assert (code, errors) == (1, f"error: cannot write {tmp_path / 'out'}: {why}\n")

    @pytest.mark.parametrize("kind", exporting.FORMATS)
    def test_a_missing_directory_is_no_fault_of_the_network(
        self, trained: Path, kind: str, tmp_path: Path
    ) -> None:
        with pytest.raises(FileNotFoundError):
            exporting.export(load(trained), kind, tmp_path / "no" / "model")

    @pytest.mark.parametrize(
        ("program", "why"),
        [
            (
                "import sys; sys.exit('zip.BadZipFile: no zip file: ' + sys.argv[1])",
                "no zip file: ",
            ),
            ("import os; os._exit(3)", "its process ended with code 3"),
            ("import sys; sys.exit('MemoryError')", "its process ended with code 1"),
        ],
    )
    def test_a_process_that_fails_is_told_of_by_the_users_name(
        self,
        trained: Path,
        split: tuple[Tensor, Tensor],
        program: str,
        why: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(exporting, "PROGRAM", program)
        untried, name = tmp_path / ".untried-model.pt2", tmp_path / "model.pt2"
        with pytest.raises(UserError) as caught:
            certify(load(trained), "torch-export", untried, *split, name=name)
        shown = why + str(name) * why.endswith(": ")
        assert str(caught.value) == f"{name} cannot be loaded and called: {shown}"

    def test_a_file_that_onnxruntime_cannot_read(
        self, trained: Path, split: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        (tmp_path / ".untried").write_bytes(b"no model")
        name = tmp_path / "model.onnx"
        with pytest.raises(UserError, match=r"model\.onnx cannot be loaded and called: ") as caught:
            certify(load(trained), "onnx", tmp_path / ".untried", *split, name=name)
        assert ".untried" not in str(caught.value)

    def test_a_network_of_one_type_only(
        self, trained: Path, split: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        model = load(trained)
        model.network.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        with pytest.raises(UserError, match=r"best\.ckpt cannot be computed in float64"):
            certify(model, "onnx", tmp_path / "model.onnx", *split)

    def test_a_network_beyond_the_limit_of_protobuf(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Huge:
            metadata_props = SimpleNamespace(add=lambda **_: None)

            def SerializeToString(self) -> bytes:  # noqa: N802  # protobuf's
                raise ValueError("exceeds maximum protobuf size of 2GB")

        made = SimpleNamespace(model_proto=Huge())
        monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: made)
        with pytest.raises(UserError, match="cannot be exported as onnx: exceeds maximum protobuf"):
            exporting.export(load(trained), "onnx", tmp_path / "model.onnx")

    def test_packages_that_are_not_installed(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        code, _, errors = called("export", trained)
        assert code == 1
        assert "--format=onnx needs onnxruntime: pip install 'equiloss[export]'" in errors

    def test_another_precision(self, tmp_path: Path) -> None:
        place = train(tmp_path / "run", "model=mlp", "trainer.precision=64-true", "debug=fast")
        with pytest.raises(ConfigError, match="was trained in 64-true: exports are of 32-true"):
            exporting.export(load(place), "torch-export", tmp_path / "model.pt2")

    def test_a_checkpoint_away_from_its_run(self, trained: Path, tmp_path: Path) -> None:
        moved = tmp_path / "best.ckpt"
        moved.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
        with pytest.raises(CheckpointError, match="its test split is not known"):
            certificate.test_split(moved)
