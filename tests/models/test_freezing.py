"""What is frozen, what is a head and a block, and that frozen batch norm evaluates throughout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from equiloss.config import ModelConfig
from equiloss.errors import ConfigError, UserError
from equiloss.models import batch_norm, freezing
from equiloss.models.build import build_network
from equiloss.models.dropout import RowKeys
from equiloss.models.head import paths_of
from equiloss.preflight.behaviour import look
from stand_ins import normalised
from support import slow, wrong_with

K = 5
CONVS = ("stages.0.conv", "stages.1.conv")


def frozen(freeze: Any, **more: Any) -> nn.Module:
    """The small network of the tests, of which something is frozen."""
    config = ModelConfig(
        name="custom", target="stand_ins:normalised", freeze=freeze, unfreeze_after_epochs=None
    )
    for key, value in more.items():
        setattr(config, key, value)
    return build_network(config, num_classes=K, image_shape=(1, 8, 8), row_keys=RowKeys(0))


def learning(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def evaluating(model: nn.Module) -> list[str]:
    """Modules that are not in training mode."""
    return [path for path, module in model.named_modules() if not module.training]


def untrained(name: str) -> nn.Module:
    """A network of torchvision without numbers."""
    with torch.device("meta"):
        return models.get_model(name, weights=None, num_classes=7)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),  # a convolution
        ("convnext_tiny", "classifier.2"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_the_head_is_the_last_layer_with_a_row_for_each_class(name: str, head: str) -> None:
    assert paths_of(untrained(name), 7) == [head]
    assert paths_of(untrained(name), 6) == []
    before = nn.Sequential(nn.Linear(2, 7), untrained(name))
    assert paths_of(before, 7) == [f"1.{head}"]


def test_the_blocks_of_networks_that_everyone_knows() -> None:
    stages = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert freezing.blocks(untrained("resnet18")) == ["conv1", "bn1", *stages, "fc"]
    # Its encoder has nearly all of the parameters: it is opened, and its layers are the blocks.
    layers = [f"encoder.layers.encoder_layer_{number}" for number in range(12)]
    stem = ["class_token", "conv_proj", "encoder.pos_embedding"]
    blocks = freezing.blocks(untrained("vit_b_16"))
    assert blocks == [*stem, *layers, "encoder.ln", "heads.head"]
    # A convolution with its normalisation, which torchvision makes of nn.Sequential, is one.
    blocks = freezing.blocks(untrained("mobilenet_v3_small"))
    assert [blocks[0], *blocks[-3:]] == [
        "features.0",
        "features.12",
        "classifier.0",
        "classifier.3",
    ]


@pytest.mark.parametrize(
    ("freeze", "learn"),
    [
        ("backbone", ["head"]),
        ("all_but_last:1", ["head"]),
        ("all_but_last=2", ["stages.1", "head"]),
        (["stem", "*.norm.*", "head.bias"], ["norm", *CONVS, "head.weight"]),
        (["stages.?"], ["stem", "norm", "head"]),
    ],
)
def test_what_is_named_does_not_learn(freeze: Any, learn: list[str]) -> None:
    model = frozen(freeze)
    names = [name for name, _ in model.named_parameters()]
    inside = [n for n in names if any(n == each or n.startswith(f"{each}.") for each in learn)]
    assert learning(model) == inside
    assert set(inside) < set(names)


def test_nothing_is_frozen_unless_it_is_asked_for() -> None:
    model = frozen(None)
    assert type(model) is type(normalised(K, 1))
    assert len(learning(model)) == len(list(model.parameters()))
    assert evaluating(model.train()) == []


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("backbone", ["norm", "stages.0.norm", "stages.1.norm", "plain"]),
        ("all_but_last:2", ["norm", "stages.0.norm"]),
        (["stages.0"], ["stages.0.norm"]),
        (["norm.weight", "stages.0.norm.bias"], []),  # what learns in part is not frozen
        (["stages"], ["stages.0.norm", "stages.1.norm", "plain"]),  # goes with what is before it
        (["head"], []),
    ],
)
def test_batch_norm_that_is_frozen_evaluates(freeze: Any, still: list[str]) -> None:
    model = frozen(freeze)
    assert evaluating(model) == still
    assert evaluating(model.train()) == still
    model.eval()
    assert evaluating(model.train()) == still
    assert evaluating(nn.Sequential(model).train()) == [f"0.{path}" for path in still]


def test_one_without_parameters_that_comes_first_goes_with_what_follows() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3), nn.Linear(3, K))
    freezing.freeze(ModelConfig(name="mlp", freeze="backbone"), model, K)
    assert evaluating(model.train()) == ["0"]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    "change",
    ["as it is", "copied", "over ranks", "synchronised", pytest.param("compiled", marks=slow)],
)
def test_it_evaluates_whatever_is_made_of_the_network(change: str) -> None:
    model: Any = frozen(["norm", "stages.0"])
    if change == "copied":
        model = copy.deepcopy(model)
    if change == "over ranks":
        batch_norm.synchronise(model)
    if change == "synchronised":  # replaces the layers; torch's passes on GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(model))[0]
        assert isinstance(model.norm, nn.SyncBatchNorm)
    if change == "compiled":
        model.compile(backend="eager")
    model.eval()
    model.train()
    assert evaluating(model) == ["norm", "stages.0.norm"]
    assert learning(model) == learning(frozen(["norm", "stages.0"]))
    if change == "synchronised":
        return
    before = buffers(model)
    model(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    changed = {n for n, buffer in buffers(model).items() if not torch.equal(buffer, before[n])}
    assert {name.rpartition(".")[0] for name in changed} == {"stages.1.norm", "plain"}


def test_the_look_at_a_network_sees_no_batch_norm_that_is_frozen() -> None:
    def images(rows: int) -> Tensor:
        return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    assert look(frozen("backbone"), images, RowKeys(0)) == []
    found = look(frozen(["norm", "stages.0"]), images, RowKeys(0))
    assert {each.module for each in found} == {"stages.1.norm (BatchNorm2d)"}


def test_unfreezing_leaves_batch_norm_as_it_is() -> None:
    model = frozen("all_but_last:1", unfreeze_after_epochs=2)
    assert learning(model) == ["head.weight", "head.bias"]
    coming = freezing.will_learn(model)
    assert freezing.unfreeze(model)
    norms = {"norm.weight", "norm.bias"}
    norms |= {f"stages.{n}.norm.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} - set(learning(model)) == norms
    assert {p for p in model.parameters() if p.requires_grad} == coming | {*model.head.parameters()}
    assert evaluating(model.train()) == ["norm", "stages.0.norm", "stages.1.norm", "plain"]
    assert not freezing.unfreeze(model)  # it has been done
    assert not freezing.unfreeze(normalised(K, 1))


def test_one_line_says_what_learns() -> None:
    config = ModelConfig(name="mlp", freeze="backbone", unfreeze_after_epochs=1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, K))
    freezing.freeze(config, model, K)
    line = freezing.described(config, model)
    assert line == (
        "model.freeze=backbone: 20 of 41 parameters learn (2), the others after 1 epoch; frozen "
        "batch normalisation (1 layer) evaluates, for the whole run"
    )
    freezing.unfreeze(model)
    line = freezing.described(config, model)
    assert line.startswith(
        "model.freeze=backbone: 35 of 41 parameters learn (all but frozen batch normalisation)"
    )
    # Batch normalisation that was not frozen learns, and is not named.
    config.freeze = ["0", "1"]
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    freezing.freeze(config, model, K)
    freezing.unfreeze(model)
    assert "(all but frozen batch normalisation);" in freezing.described(config, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["stagse"]}, r"parameters in model\.freeze 'stagse'\. Did you mean 'stages'\?"),
        ({"freeze": ["stages.0.cnov"]}, "Did you mean 'stages.0.conv'"),
        ({"freeze": ["xyz"]}, "'xyz'. Known: stem, norm, stages, head$"),
        ({"freeze": ["*"]}, r"model\.freeze=\[\*\] freezes all 11 parameters .* nothing would"),
        ({"freeze": "all_but_last:5"}, "freezes nothing of model 'custom', whose blocks are stem,"),
        (
            {"freeze": ["*norm"], "unfreeze_after_epochs": 1},
            r"epochs=1 unfreezes nothing: model\.freeze=\[\*norm\] names batch normalisation alone",
        ),
        ({"freeze": "backbone", "target": "stand_ins:batch_norm"}, "has lazy layers"),
        ({"freeze": "backbone", "target": "stand_ins:headless"}, "no layer of 5 outputs"),
    ],
)
def test_what_cannot_be_frozen_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        frozen(**options)
    assert wrong_with(str(refused.value)) is None


@pytest.mark.parametrize(
    "options",
    [
        *({"freeze": value} for value in ("backbon", "all_but_last:0", [], [True], 3, "conv1")),
        {"unfreeze_after_epochs": 1},
        {"freeze": "backbone", "unfreeze_after_epochs": 0},
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.(un)?freeze") as refused:
        ModelConfig(name="mlp", **options)
    assert wrong_with(str(refused.value)) is None
