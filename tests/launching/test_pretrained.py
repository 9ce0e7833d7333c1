"""What published weights expect stands in the configuration, unless the user has set it."""

from __future__ import annotations

from pathlib import Path

import pytest

from equiloss.config.resolved import ResolvedConfig
from equiloss.data.files import IMAGENET_MEAN, IMAGENET_STD
from equiloss.distributed import membership
from equiloss.errors import ModelError
from equiloss.launching import notebook
from equiloss.launching.pretrained import following_weights
from equiloss.launching.resume import changes
from support import Train, composed, wrong_with

PICTURES = ("data=image_folder", "data.root=/pictures")
DEFAULT = ("model=torchvision", "model.weights=DEFAULT")


def changed(*overrides: str) -> dict[str, object]:
    """What following the weights changes in a configuration."""
    before = composed(*overrides)
    return {each.key: each.after for each in changes(before.plain, following_weights(before).plain)}


def test_mean_deviation_and_size_are_those_of_the_weights(capsys: pytest.CaptureFixture) -> None:
    assert changed(*DEFAULT, *PICTURES) == {
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
    own = ("data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", "data.image_size=64")
    weights = ("model=torchvision", "model.weights=IMAGENET1K_V1")
    assert changed(*weights, *PICTURES, *own) == {}
    assert changed(*weights, *PICTURES, *own[1:]) == {"data.mean": list(IMAGENET_MEAN)}


@pytest.mark.parametrize(
    ("weights", "size"), [("null", 224), ("w.pth", 224), ("DEFAULT", None), ("IMAGENET1K_V1", None)]
)
@pytest.mark.parametrize("data", ["image_folder", "table"])
def test_the_usual_size_gives_way_to_that_of_weights(
    data: str, weights: str, size: int | None
) -> None:
    words = (f"data={data}", "data.root=/a", "data.table=b", f"model.weights={weights}")
    assert composed("model=torchvision", *words).config.data.image_size == size
    own = composed("model=torchvision", *words, "data.image_size=64")
    assert own.config.data.image_size == 64


def test_it_is_settled_once() -> None:
    """So that a run that goes on, on whatever machine, has the hash that it began with."""
    settled = following_weights(composed(*DEFAULT, *PICTURES))
    assert following_weights(settled) is settled
    words = ("model=torchvision", "model.weights=IMAGENET1K_V1", *PICTURES)
    named = following_weights(composed(*words))
    assert named.hash == settled.hash
    assert settled.config.data.image_size == settled.plain["data"]["image_size"] == 224


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (("data=digits",), True),
        (("data=synthetic",), True),
        (("data=synthetic", "+data.options.channels=3"), False),
        (("data=cifar10",), False),
        ((*PICTURES, "+data.options.channels=1"), True),
        (("data=custom", "data.target=a:b"), False),
    ],
)
def test_grey_images_get_the_mean_over_the_channels(data: tuple[str, ...], grey: bool) -> None:
    found = changed(*DEFAULT, *data)
    assert found["data.mean"] == ([0.449] if grey else list(IMAGENET_MEAN))
    assert found["data.std"] == ([0.226] if grey else list(IMAGENET_STD))
    # Images that live in memory stay as they are stored.
    assert ("data.image_size" in found) == (data[0] in PICTURES)


@pytest.mark.parametrize(
    ("name", "weights", "options"),
    [
        ("googlenet", "DEFAULT", {"transform_input": True}),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}),
        ("resnet18", "DEFAULT", {}),
    ],
)
def test_options_that_the_weights_need_are_set(
    name: str, weights: str, options: dict[str, object]
) -> None:
    """In the configuration, so that whatever rebuilds the network has them too."""
    words = ("model=torchvision", f"model.name={name}", f"model.weights={weights}", *PICTURES)
    assert following_weights(composed(*words)).config.model.options == options
    if options:
        key, value = next(iter(options.items()))
        other = False if value is True else 32
        own = following_weights(composed(*words, f"+model.options.{key}={other}".lower()))
        assert own.config.model.options == {key: other}


def test_of_timm_too() -> None:
    words = ("model=timm", "model.name=test_vit", "model.weights=DEFAULT")
    assert changed(*words, *PICTURES) == {
        "model.weights": "r160_in1k",
        "data.mean": [0.5, 0.5, 0.5],
        "data.std": [0.5, 0.5, 0.5],
        "data.image_size": 160,
    }


@pytest.mark.parametrize("weights", ["null", "mine/w.pth", "w.safetensors"])
def test_a_file_says_nothing_of_them(weights: str) -> None:
    assert changed("model=torchvision", f"model.weights={weights}", *PICTURES) == {}


def test_only_the_first_rank_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(membership, "is_first", lambda: False)
    assert changed(*DEFAULT, *PICTURES)["data.image_size"] == 224
    assert capsys.readouterr().out == ""


def test_unknown_weights_are_named_before_any_file_is_read() -> None:
    with pytest.raises(
        ModelError, match=r"unknown model\.weights of resnet18 'IMAGENET'"
    ) as caught:
        changed("model=torchvision", "model.weights=IMAGENET", *PICTURES)
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
        notebook.fit(composed(*DEFAULT), tmp_path)
    assert given[0].config.data.mean == [0.449]


def test_the_command_stores_them_and_names_the_missing_file(train: Train, tmp_path: Path) -> None:
    words = ("debug=fast", "callbacks=quiet", "logger=csv", f"hydra.run.dir={tmp_path}/run")
    done = train(*words, *DEFAULT, "model.name=squeezenet1_1", "data.image_size=32", anew=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model.weights=IMAGENET1K_V1 is not here: put https://download.pytorch.org/" in line
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "weights: IMAGENET1K_V1" in stored
    assert "- 0.449" in stored
