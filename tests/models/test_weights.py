"""Weights to start from: what fits is loaded, and what does not is named in one line."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from equiloss.config import Config, ModelConfig
from equiloss.errors import CheckpointError, ConfigError, ModelError, UserError
from equiloss.models import weights
from equiloss.models.build import build_network
from equiloss.models.dropout import RowKeys
from equiloss.models.head import paths_of
from equiloss.records.results import Result
from equiloss.training.about import About
from support import Run, composed, final_weights, slow, wrong_with

SMALL = {"name": "convnet", "options": {"widths": [8, 16]}}
SQUEEZE = "squeezenet1_1-b8a52dc0.pth"


def network(classes: int = 5, channels: int = 1, size: int = 16, seed: int = 0, **config: Any):
    torch.manual_seed(seed)
    model = ModelConfig(**{**SMALL, **config})
    shape = (channels, size, size)
    return build_network(model, num_classes=classes, image_shape=shape, row_keys=RowKeys(0))


def save(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


def load(model: nn.Module, classes: int = 5, **config: Any) -> str:
    return weights.give(model, ModelConfig(**{**SMALL, **config}), classes)


def refused(call: Callable[[], Any]) -> str:
    """The line that a user is shown."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert wrong_with(line) is None
    return line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of a small network for 5 classes."""
    return save(network().state_dict(), tmp_path / "small.pth")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps published files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    return place


class TestFitting:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_a_network_is_the_one_of_the_file(self, dtype: torch.dtype, tmp_path: Path) -> None:
        before = network().to(dtype)
        file = save(before.state_dict(), tmp_path / "w.pt")
        other = network(seed=1).double()
        said = load(other, weights=str(file))
        assert said == f"{len(before.state_dict())} tensors from {file}"
        for name, tensor in before.state_dict().items():
            found = other.state_dict()[name]
            assert found.dtype == torch.float64
            assert torch.equal(found, tensor.double())

    def test_a_head_of_another_size_stays_new(self, file: Path) -> None:
        model = network(classes=7, seed=1)
        head = model.head.weight.clone()
        said = load(model, 7, weights=str(file))
        assert said.endswith("; the head is new (head.weight, head.bias)")
        assert torch.equal(model.head.weight, head)
        taken = network().state_dict()
        others = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
        assert all(torch.equal(tensor, taken[name]) for name, tensor in others.items())

    def test_a_file_of_a_backbone_leaves_the_head_new(self, file: Path, tmp_path: Path) -> None:
        backbone = {n: t for n, t in torch.load(file).items() if not n.startswith("head.")}
        said = load(network(), weights=str(save(backbone, tmp_path / "b.pth")))
        assert said.endswith("; the head is new (head.weight, head.bias)")

    def test_a_head_that_differs_in_more_than_its_classes_is_no_head(self, tmp_path: Path) -> None:
        wide = network(classes=7, options={"widths": [8, 32]})
        file = save(wide.state_dict(), tmp_path / "w.pth")
        line = refused(lambda: load(network(), weights=str(file)))
        theirs, own = wide.state_dict(), network().state_dict()
        others = [name for name, tensor in own.items() if tensor.shape != theirs[name].shape]
        assert {"head.weight", "head.bias"} < {*others}
        words = f" does not fit model 'convnet': left out would be {len(others)} of the network's "
        assert words in line
        said = load(network(), weights=str(file), weights_strict=False)
        assert "head is new" not in said

    def test_a_head_that_is_a_convolution(self) -> None:
        model = network(classes=3, size=64, name="squeezenet1_1", options={}, channels=3)
        assert paths_of(model, 3) == ["classifier.1"]

    def test_a_grey_stem_is_what_rgb_pictures_of_grey_give(self, tmp_path: Path) -> None:
        colour = network(channels=3).double().eval()
        file = save(colour.state_dict(), tmp_path / "rgb.pth")
        grey = network(seed=1).double().eval()
        said = load(grey, weights=str(file))
        assert " is summed over 3 channels, approximately as if grey images were shown " in said
        images = torch.randn(4, 1, 16, 16, dtype=torch.float64)
        # Three products in another order.
        torch.testing.assert_close(
            grey(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-12, atol=1e-12
        )

    def test_the_sum_over_channels_is_no_coarser_than_float32(self, tmp_path: Path) -> None:
        state = network(channels=3).half().state_dict()
        model = network(seed=1)
        load(model, weights=str(save(state, tmp_path / "half.pth")))
        stem = next(iter(state))
        assert torch.equal(model.state_dict()[stem], state[stem].float().sum(1, keepdim=True))

    def test_other_channels_are_refused(self, file: Path) -> None:
        line = refused(lambda: load(network(channels=3), weights=str(file)))
        assert "is [8, 1, 3, 3] in the file and [8, 3, 3, 3] in the network" in line

    def test_what_does_not_fit_is_named_and_counted(self, file: Path, tmp_path: Path) -> None:
        state = torch.load(file)
        names = list(state)
        missing = state.pop(names[0])
        state[names[1]] = torch.zeros(3)
        state["extra.weight"] = state["extra.bias"] = missing
        other = save(state, tmp_path / "other.pth")
        line = refused(lambda: load(network(), weights=str(other)))
        assert line.startswith(f"model.weights={other} does not fit model 'convnet': left out ")
        assert " would be 2 of the network's tensors, and 3 of the file's (" in line
        assert f"({names[0]} is not in the file; {names[1]} is [3] in the file and " in line
        assert line.endswith("; …); model.weights_strict=false loads the others")
        model = network(seed=1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        said = load(model, weights=str(other), weights_strict=False)
        assert said.startswith(f"{len(names) - 2} tensors from ")
        left = f"2 of the network's tensors, and 3 of the file's ({names[0]} is not in the file; "
        assert f"; left out: {left}" in said
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in names[:2])
        assert all(torch.equal(after[name], state[name]) for name in names[2:])

    def test_values_that_are_not_finite_are_refused(self, file: Path, tmp_path: Path) -> None:
        state = torch.load(file)
        name = next(iter(state))
        state[name][0] = float("nan")
        other = save(state, tmp_path / "nan.pth")
        assert f"({name} is not finite in the file)" in refused(
            lambda: load(network(), weights=str(other))
        )
        model = network(seed=1)
        load(model, weights=str(other), weights_strict=False)
        assert torch.isfinite(model.state_dict()[name]).all()

    @pytest.mark.parametrize("strict", [True, False])
    def test_another_networks_file_is_refused_whatever_is_asked(
        self, strict: bool, tmp_path: Path
    ) -> None:
        mlp = network(name="mlp", options={"widths": [9]}, classes=4)
        file = save({f"other.{n}": t for n, t in mlp.state_dict().items()}, tmp_path / "w.pth")
        line = refused(lambda: load(network(), weights=str(file), weights_strict=strict))
        assert line.endswith("; none fits, so that it is another network's")

    def test_batch_norm_of_an_old_file_has_no_count(self, tmp_path: Path) -> None:
        model = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(3), head=nn.Linear(3, 5)))
        state = {n: t for n, t in model.state_dict().items() if "tracked" not in n}
        file = save(state, tmp_path / "old.pth")
        assert load(model, weights=str(file)) == f"6 tensors from {file}"

    def test_weights_stay_in_their_order_in_memory(self, file: Path) -> None:
        model = network(seed=1).to(memory_format=torch.channels_last)
        load(model, weights=str(file))
        convolution = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1]
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


class TestFiles:
    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
    def test_a_state_dict_is_found_where_scripts_put_it(
        self, key: str, prefix: str, tmp_path: Path
    ) -> None:
        state = network().state_dict()
        wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        # PyTorch's own example has its best accuracy beside it.
        content = {
            "epoch": 3,
            "optimizer": {"state": {}},
            "best_acc1": torch.ones(()),
            key: wrapped,
        }
        model = network(seed=1)
        load(model, weights=str(save(content, tmp_path / "w.pth")))
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    def test_safetensors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from safetensors.torch import save_file

        state = network().state_dict()
        file = tmp_path / "w.safetensors"
        save_file(state, file)
        model = network(seed=1)
        load(model, weights=str(file))
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        file.write_bytes(file.read_bytes()[:60])
        line = refused(lambda: load(model, weights=str(file)))
        assert line.startswith(f"model.weights={file} is damaged, or no file of safetensors: ")
        monkeypatch.setitem(sys.modules, "safetensors", None)
        line = refused(lambda: load(model, weights=str(file)))
        assert line.endswith("is not installed: pip install 'equiloss[safetensors]'")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("content", [{"a": Harmful()}, nn.Linear(2, 2)])
    def test_code_is_refused_and_not_run(
        self, content: Any, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save(content, "w.pth", _use_new_zipfile_serialization=zipped)
        line = refused(lambda: load(network(), weights="w.pth"))
        assert line.startswith("model.weights=w.pth holds more than tensors (")
        assert ("posix.mkdir" if isinstance(content, dict) else "Linear") in line
        assert line.endswith("nothing of it was run; save network.state_dict() alone")
        assert not Path("harm").exists()

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (None, ": there is no such file"),
            (b"", " is damaged, or was not written by torch.save"),
            (b"hello, world " * 9, " is damaged, or was not written by torch.save"),
            ({"epoch": 3}, " holds no tensors by their names: save network.state_dict()"),
            ([torch.zeros(2)], " holds no tensors by their names: save network.state_dict()"),
            ({"equiloss": {}, "state_dict": {}}, " is a checkpoint of equiloss: start from it by "),
        ],
    )
    def test_what_is_no_state_dict_is_named(self, content: Any, why: str, tmp_path: Path) -> None:
        file = tmp_path / "w.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            save(content, file)
        line = refused(lambda: load(network(), weights=str(file)))
        assert line.startswith(f"model.weights={file}{why}")

    def test_a_damaged_file_and_a_directory(self, file: Path, tmp_path: Path) -> None:
        file.write_bytes(file.read_bytes()[:400])
        assert "is damaged" in refused(lambda: load(network(), weights=str(file)))
        (tmp_path / "d.pth").mkdir()
        line = refused(lambda: load(network(), weights=f"{tmp_path}/d.pth"))
        assert line.endswith("is a directory: name a file in it")


class TestPublished:
    CONFIG: ClassVar = {"name": "squeezenet1_1", "options": {}, "weights": "DEFAULT"}

    def test_a_file_in_the_cache_is_loaded(
        self, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        big = network(classes=1000, channels=3, size=64, **self.CONFIG)
        file = save(big.state_dict(), cache / SQUEEZE)
        model = network(channels=3, size=64, seed=1, **self.CONFIG)
        said = load(model, **self.CONFIG)
        assert said.startswith(f"50 tensors from IMAGENET1K_V1 ({file}); the head is new (classi")
        assert torch.equal(model.features[0].weight, big.features[0].weight)
        # It is not what torchvision has published, and the name says so.
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        assert f"its SHA-256 begins with {digest}, and not as its name says" in caplog.text

    def test_a_missing_one_is_named_with_its_url_and_its_place(self, cache: Path) -> None:
        line = refused(lambda: weights.fetch(ModelConfig(**self.CONFIG)))
        assert line == (
            "model.weights=IMAGENET1K_V1 is not here: put "
            f"https://download.pytorch.org/models/{SQUEEZE} at {cache}/{SQUEEZE}, or have it "
            "fetched by model.download=true"
        )

    def test_it_is_fetched_where_that_is_wanted(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def fetch(url: str, place: str, digest: str, progress: bool) -> None:
            asked.append((url, place, digest))
            Path(place).write_text("weights")

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        config = ModelConfig(**self.CONFIG, download=True)
        (cache / SQUEEZE).parent.rmdir()
        weights.fetch(config)
        weights.fetch(config)
        url = f"https://download.pytorch.org/models/{SQUEEZE}"
        assert asked == [(url, f"{cache}/{SQUEEZE}", "b8a52dc0")]

    def test_a_failure_to_fetch_is_one_line(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        error: Exception = URLError(OSError(-2, "Name or service not known"))
        line = refused(lambda: weights.fetch(ModelConfig(**self.CONFIG, download=True)))
        assert "could not be fetched (Name or service not known); put it at " in line
        error = RuntimeError('invalid hash value (expected "b8a52dc0", got "0")')
        line = refused(lambda: weights.fetch(ModelConfig(**self.CONFIG, download=True)))
        assert f"{SQUEEZE} gave a file that has not the SHA-256 of its name; it was thrown" in line

    def test_unknown_ones_get_the_near_miss(self) -> None:
        config = ModelConfig(**{**self.CONFIG, "weights": "IMAGENET1K_V2"})
        line = refused(lambda: weights.named(config))
        assert line == (
            "unknown model.weights of squeezenet1_1 'IMAGENET1K_V2'. Did you mean "
            "'IMAGENET1K_V1'? Known: DEFAULT, IMAGENET1K_V1; or a file that ends in .pth, .pt or "
            ".safetensors"
        )

    def test_auxiliary_classifiers_are_left_out(self, cache: Path) -> None:
        given = {"conv.weight": torch.ones(1), "aux1.conv.weight": torch.ones(1)}
        found = weights._renamed(given, ModelConfig(name="googlenet"))
        assert list(found) == ["conv.weight"]
        assert weights._renamed(given, ModelConfig(name="resnet18")) is given

    def test_old_names_of_dense_layers(self) -> None:
        layer = "features.denseblock1.denselayer12"
        given = {f"{layer}.norm.1.weight": torch.ones(1), f"{layer}.conv.2.weight": torch.ones(1)}
        found = weights._renamed(given, ModelConfig(name="densenet121"))
        assert list(found) == [f"{layer}.norm1.weight", f"{layer}.conv2.weight"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"weights": "DEFAULT"}, "nobody publishes weights for model=convnet; a file ends in"),
        ({"weights": "a/b.bin"}, r"a/b\.bin is no name of weights, and a file ends in \.pth"),
        ({"weights": "best.ckpt"}, r"checkpoints of equiloss go by init_from=; a file ends in"),
        ({"weights": ""}, "is no name of weights"),
        ({"library": "tim"}, "unknown model.library 'tim'. Did you mean 'timm'"),
    ],
)
def test_what_names_no_weights_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**{**SMALL, **config})


def test_a_fit_starts_from_one_thing() -> None:
    with pytest.raises(ConfigError, match=r"init_from=a\.ckpt and model\.weights=b\.pth both say"):
        Config(model=ModelConfig(name="mlp", weights="b.pth"), init_from="a.ckpt")


def test_options_cannot_name_them() -> None:
    with pytest.raises(ModelError, match=r"options\.weights cannot be set: model\.weights names"):
        network(name="resnet18", options={"weights": "DEFAULT"})


class TestRuns:
    # Steps that move a weight by no more than 1e-20.
    WORDS = (
        *("debug=fast", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "data.max_samples=50"),
        *("parity=off", "logger=csv"),
    )

    def test_a_fit_starts_from_them_and_goes_on_without(
        self, run_here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = network(classes=10, size=8, seed=3)
        file = save(before.state_dict(), tmp_path / "w.pth")
        caplog.set_level("INFO")
        words = (*self.WORDS, f"model.weights={file}")
        run_here(*words)
        count = len(before.state_dict())
        assert f"starting with {count} tensors from {file}" in caplog.messages
        after = final_weights(tmp_path / "run")
        for name, tensor in before.state_dict().items():
            assert (after[f"model.{name}"] - tensor).abs().max() < 1e-20
        # What goes on, or is evaluated, has weights of its own.
        file.unlink()
        caplog.clear()
        run_here(*words, "trainer.max_epochs=2")
        best = tmp_path / "run" / "checkpoints" / "best.ckpt"
        run_here(*words, "task=test", f"ckpt_path={best}", directory=tmp_path / "test")
        assert not [line for line in caplog.messages if line.startswith("starting with")]
        with pytest.raises(CheckpointError, match="there is no such file"):
            run_here(*words, directory=tmp_path / "anew")

    def test_of_code_of_ones_own(self, run_here: Run, tmp_path: Path) -> None:
        from stand_ins import learning

        before = learning(10, 1)
        file = save(before.state_dict(), tmp_path / "w.pth")
        custom = ("model=custom", "model.target=stand_ins:learning", "~model.options.widths")
        run_here(*self.WORDS, *custom, f"model.weights={file}")
        after = final_weights(tmp_path / "run")
        for name, parameter in before.named_parameters():
            assert (after[f"model.{name}"] - parameter).abs().max() < 1e-20


def test_a_checkpoint_says_of_which_library_its_network_is() -> None:
    saved = {
        "model": {"name": "resnet18", "target": None, "options": {}},
        "class_names": ["a", "b"],
        "image_shape": [1, 8, 8],
        "image_size": None,
        "mean": [0.5],
        "std": [0.5],
        "range": None,
        "background": "white",
        "data": "digits",
        "precision": "32-true",
        "channels_last": False,
        "versions": {},
    }
    # As earlier versions wrote it.
    assert ModelConfig(**About.read(saved, "a.ckpt").model).library == "torchvision"
    other = {**saved, "model": {**saved["model"], "library": "timm"}}
    assert About.read(other, "a.ckpt").model["library"] == "timm"
    for model in (None, {"name": "resnet18"}, {**other["model"], "library": 3}):
        with pytest.raises(CheckpointError, match="another version of equiloss"):
            About.read({**saved, "model": model}, "a.ckpt")


NETWORKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mobilenet_v3_small": ({}, {"neighbours", "learns"}),
    "efficientnet_b0": ({}, {"neighbours", "learns"}),
    "convnext_tiny": ({}, set()),
    "vit_b_16": ({"image_size": 32}, set()),
    "timm/test_efficientnet": ({"drop_path_rate": 0.2}, {"neighbours", "learns"}),
}


def distance(state: Mapping[str, Tensor], network: nn.Module) -> float:
    """From the parameters of a network of as many layers, but for its head of 1000 classes."""
    parts = [
        (state[name] - parameter).detach().double().square().sum()
        for name, parameter in network.named_parameters()
        if parameter.shape[0] != 1000
    ]
    return torch.stack(parts).sum().sqrt().item()


@slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_start_from_weights_of_1000_classes(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Built, loaded, trained for five steps and evaluated; and only batch norm minds the others."""
    from equiloss import load as load_run
    from equiloss.run import run

    options, effects = NETWORKS[name]
    library, _, own = name.rpartition("/")
    words = (
        f"model={library or 'torchvision'}",
        f"model.name={own}",
        "data=synthetic",
        "data.options={channels:3,size:32,num_samples:60,num_classes:4}",
        "data.batch_size=8",
        "trainer.max_steps=5",
        "optimizer.lr=0.001",
        "callbacks=quiet",
        "logger=csv",
        *(f"+model.options.{key}={value}" for key, value in options.items()),
    )
    config = composed(*words).config.model
    big = build_network(config, num_classes=1000, image_shape=(3, 32, 32), row_keys=RowKeys(0))
    file = save(big.state_dict(), tmp_path / "w.pth")
    caplog.set_level("INFO")
    run(composed(*words, f"model.weights={file}"), tmp_path / "run")
    (said,) = [line for line in caplog.messages if line.startswith("starting with ")]
    assert said.startswith(f"starting with {len(big.state_dict()) - 2} tensors from {file}")
    assert "; the head is new (" in said
    result = Result.read(tmp_path / "run")
    assert (result.status, result.steps["taken"]) == ("completed", 5)
    assert {each["effect"] for each in result.network} == effects
    assert all(each["batch_norm"] for each in result.network)
    # A checkpoint says of which library its network is, and has its logits.
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    loaded = load_run(tmp_path / "run/checkpoints/last.ckpt")
    shape = {"image_shape": (3, 32, 32), "row_keys": RowKeys(0)}
    rebuilt = build_network(config, num_classes=4, **shape)
    saved: dict[str, Tensor] = final_weights(tmp_path / "run")
    after = {key.removeprefix("model."): tensor for key, tensor in saved.items()}
    rebuilt.load_state_dict(after)
    mean, deviation = loaded.statistics
    with torch.no_grad():
        expected = rebuilt.eval()((pixels - mean) / deviation)
    assert torch.equal(loaded.logits(pixels.to(torch.uint8)), expected)
    # Five small steps go nowhere near as far as another beginning is away.
    fresh = build_network(config, num_classes=1000, **shape)
    assert 0 < distance(after, big) < 0.1 * distance(dict(fresh.named_parameters()), big)
