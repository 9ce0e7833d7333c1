"""What published weights expect stands in the configuration, unless the user has set it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.data.files import IMAGENET_MEAN, IMAGENET_STD
from equiloss.distributed import membership
from equiloss.errors import ModelError
from equiloss.launching import notebook
from equiloss.launching.pretrained import following_weights
from equiloss.launching.resume import changes
from support import Train, composed, wrong_with

PICTURES = {"data.name": "image_folder", "data.root": "/pictures"}
NAMED = {"model.weights": "IMAGENET1K_V1"}


@cache
def default() -> ResolvedConfig:
    return composed("model=torchvision", "model.weights=DEFAULT", "data.root=/pictures")


def config(*keys: dict[str, Any]) -> ResolvedConfig:
    """A network of torchvision with its default weights, and other values of some keys."""
    changed = OmegaConf.create(default().plain)
    for each in keys:
        for key, value in each.items():
            OmegaConf.update(changed, key, value, force_add=True)
    return resolve(changed)


def changed(*keys: dict[str, Any]) -> dict[str, object]:
    """What following the weights changes in a configuration."""
    before = config(*keys)
    return {each.key: each.after for each in changes(before.plain, following_weights(before).plain)}


def test_mean_deviation_and_size_are_those_of_the_weights(capsys: pytest.CaptureFixture) -> None:
    assert changed(PICTURES) == {
        "model.weights": "IMAGENET1K_V1",
        "data.mean": list(IMAGENET_MEAN),
        "data.std": list(IMAGENET_STD),
        "data.image_size": 224,
    }
    assert capsys.readouterr().out == (
        "model.weights=DEFAULT: IMAGENET1K_V1 data.mean=[0.485, 0.456, 0.406] "
        "data.std=[0.229, 0.224, 0.225] data.image_size=224\n"
    )


def test_what_the_user_sets_stays() -> None:
    own = {"data.std": [0.4, 0.5, 0.6], "data.image_size": 64}
    assert changed(NAMED, PICTURES, own) == {"data.mean": list(IMAGENET_MEAN)}
    assert changed(NAMED, PICTURES, own, {"data.mean": [0.1, 0.2, 0.3]}) == {}


@pytest.mark.parametrize(
    ("data", "weights", "size"), [("image_folder", "DEFAULT", None), ("table", "w.pth", 224)]
)
def test_the_usual_size_gives_way_to_that_of_weights(
    data: str, weights: str, size: int | None
) -> None:
    words = (f"data={data}", "data.root=/a", "data.table=b", "model=torchvision")
    words = (*words, f"model.weights={weights}")
    assert composed(*words).config.data.image_size == size
    assert composed(*words, "data.image_size=64").config.data.image_size == 64


def test_it_is_settled_once() -> None:
    """So that a run that goes on, on whatever machine, has the hash that it began with."""
    settled = following_weights(config(PICTURES))
    assert following_weights(settled) is settled
    assert following_weights(config(PICTURES, NAMED)).hash == settled.hash
    assert settled.config.data.image_size == settled.plain["data"]["image_size"] == 224


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        ({"data.name": "digits"}, True),
        ({"data.name": "synthetic"}, True),
        ({"data.name": "synthetic", "data.options.channels": 3}, False),
        ({"data.name": "cifar10"}, False),
        ({**PICTURES, "data.options.channels": 1}, True),
        ({"data.name": "custom", "data.target": "a:b"}, False),
    ],
)
def test_grey_images_get_the_mean_over_the_channels(data: dict[str, Any], grey: bool) -> None:
    found = changed(data)
    assert found["data.mean"] == ([0.449] if grey else list(IMAGENET_MEAN))
    assert found["data.std"] == ([0.226] if grey else list(IMAGENET_STD))
    # Images that live in memory stay as they are stored.
    assert ("data.image_size" in found) == (data["data.name"] == "image_folder")


@pytest.mark.parametrize(
    ("name", "weights", "options", "other"),
    [
        ("googlenet", "DEFAULT", {"transform_input": True}, False),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}, 32),
    ],
)
def test_options_that_the_weights_need_are_set(
    name: str, weights: str, options: dict[str, Any], other: object
) -> None:
    """In the configuration, so that whatever rebuilds the network has them too."""
    model = {"model.name": name, "model.weights": weights}
    (key,) = options
    assert following_weights(config(model)).config.model.options == options
    own = config(model, {f"model.options.{key}": other})
    assert following_weights(own).config.model.options == {key: other}


def test_of_timm_too() -> None:
    assert changed(PICTURES, {"model.name": "test_vit", "model.library": "timm"}) == {
        "model.weights": "r160_in1k",
        "data.mean": [0.5, 0.5, 0.5],
        "data.std": [0.5, 0.5, 0.5],
        "data.image_size": 160,
    }


@pytest.mark.parametrize("weights", [None, "mine/w.pth"])
def test_a_file_says_nothing_of_them(weights: str | None) -> None:
    assert changed(PICTURES, {"model.weights": weights}) == {}


def test_only_the_first_rank_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(membership, "is_first", lambda: False)
    assert changed(PICTURES)["data.image_size"] == 224
    assert capsys.readouterr().out == ""


def test_unknown_weights_are_named_before_any_file_is_read() -> None:
    with pytest.raises(ModelError, match=r"unknown model\.weights of resnet18 'IMAGENE'") as caught:
        changed({"model.weights": "IMAGENE"})
    assert wrong_with(str(caught.value)) is None


def test_a_notebook_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ResolvedConfig] = []

    class Asked(Exception):  # noqa: N818
        pass

    def claim(place: Path, config: ResolvedConfig) -> None:
        given.append(config)
        raise Asked

    monkeypatch.setattr(notebook, "claim", claim)
    with pytest.raises(Asked):
        notebook.fit(default(), tmp_path)
    assert given[0].config.data.mean == [0.449]


def test_the_command_stores_them_and_names_the_missing_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where there is none, whoever runs this
    words = ("debug=fast", "callbacks=quiet", "logger=csv", f"hydra.run.dir={tmp_path}/run")
    network = ("model=torchvision", "model.name=squeezenet1_1", "model.weights=DEFAULT")
    done = train(*words, *network, "data.image_size=32")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model.weights=IMAGENET1K_V1 is not here: put https://download.pytorch.org/" in line
    assert f" at {tmp_path}/hub/checkpoints/squeezenet1_1" in line
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "weights: IMAGENET1K_V1" in stored
    assert "- 0.449" in stored
