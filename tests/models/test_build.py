"""Networks: images in, one logit per class out, or an error that says what does not fit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from equiloss.config import Config, ModelConfig, TrainerConfig
from equiloss.errors import ConfigError, ModelError
from equiloss.models import batch_norm
from equiloss.models.build import build_network, lay_out, memory_order
from equiloss.models.dropout import RowKeys
from equiloss.models.networks import ConvNet
from equiloss.preflight.network import check_head

OWN = ("convnet", "mlp")


def made(
    name: str, shape: tuple[int, int, int] = (1, 8, 8), *, classes: int = 5, **config: object
) -> nn.Module:
    row_keys = RowKeys(0)
    config = ModelConfig(name=name, **config)
    model = build_network(config, num_classes=classes, image_shape=shape, row_keys=row_keys)
    check_head(name, model, classes, shape)
    order = torch.channels_last if config.channels_last is True else torch.contiguous_format
    return lay_out(config, model, order)


def images(rows: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0))


class TestOwnNetworks:
    @pytest.mark.parametrize("name", OWN)
    @pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
    def test_one_logit_per_class(self, name, shape):
        assert made(name, shape)(images(4, shape)).shape == (4, 5)

    @pytest.mark.parametrize("name", OWN)
    def test_a_row_does_not_know_the_others(self, name):
        """So that a step is the same however its batch is split, in training mode too."""
        model = made(name).double().train()
        batch = images(6).double()
        # Float64 with sums of some hundred terms, in another order for another batch size.
        torch.testing.assert_close(
            torch.cat([model(part) for part in batch.split([1, 3, 2])]),
            model(batch),
            rtol=1e-12,
            atol=1e-13,
        )

    @pytest.mark.parametrize("name", OWN)
    def test_no_rows_go_forward_and_backward(self, name):
        model = made(name)
        logits = model(images(0))
        assert logits.shape == (0, 5)
        logits.sum().backward()
        assert all(not parameter.grad.any() for parameter in model.parameters())

    @pytest.mark.parametrize("name", OWN)
    def test_the_head_reads_the_features(self, name):
        model = made(name).eval()
        assert torch.equal(model.head(model.forward_features(images(3))), model(images(3)))

    @pytest.mark.parametrize("name", OWN)
    def test_options_are_those_of_the_class(self, name):
        wide = made(name, options={"widths": [16, 24, 32], "dropout": 0.5})
        assert wide.head.in_features == {"convnet": 2 * 32, "mlp": 32}[name]
        assert {m.p for m in wide.modules() if isinstance(m, nn.Dropout)} == {0.5}
        assert not torch.equal(wide.train()(images(2)), wide(images(2)))  # dropout is drawn anew


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "normalises"),
        [
            ("resnet18", True),
            ("mobilenet_v3_small", True),
            ("squeezenet1_1", False),
            ("googlenet", True),
        ],
    )
    def test_classifiers_take_grey_images_and_any_number_of_classes(self, name, normalises):
        shape = (1, 32, 32)
        with warnings.catch_warnings():
            # googlenet announces how it will draw its weights in a later release
            warnings.simplefilter("ignore", FutureWarning)
            model = made(name, shape, classes=7)
        assert model(images(2, shape)).shape == (2, 7)
        assert batch_norm.is_in(model) is normalises

    def test_colour_images_keep_the_stem(self):
        torch.manual_seed(0)
        grey = made("resnet18", (1, 32, 32))
        torch.manual_seed(0)
        colour = made("resnet18", (3, 32, 32))
        assert grey.conv1.weight.shape == (64, 1, 7, 7)
        assert colour.conv1.weight.shape == (64, 3, 7, 7)
        assert (grey.conv1.stride, grey.conv1.bias) == (colour.conv1.stride, colour.conv1.bias)

    def test_images_that_are_too_small_are_refused_with_the_way_out(self):
        with pytest.raises(ModelError) as caught:
            made("alexnet", (1, 8, 8))
        message = str(caught.value)
        assert message.startswith("model 'alexnet' cannot process 1x8x8 images: ")
        assert "data.image_size=" in message
        assert "\n" not in message

    def test_whatever_a_network_raises_is_its_own(self):
        class Sharp(nn.Module):
            def forward(self, x):
                return x.mean(dim=4)

        with pytest.raises(ModelError, match=r"'sharp' cannot process 3x8x8 images: Dimension out"):
            check_head("sharp", Sharp(), 10, (3, 8, 8))


class TestCustom:
    def test_by_import_path_with_options(self):
        model = made("custom", target="stand_ins:scaled", options={"gap": 3.0})
        logits = model(torch.zeros(1, 1, 8, 8))
        assert logits.shape == (1, 5)

    def test_a_head_for_other_classes_is_refused_with_both_numbers(self):
        with pytest.raises(ModelError, match=r"'custom' gives \[6\] logits .* data has 5 classes"):
            made("custom", target="stand_ins:too_many_logits")

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("no_such_module:net", "No module named 'no_such_module'"),
            ("stand_ins:no_such_net", "no_such_net"),
            ("stand_ins", r"package\.module:function"),
            ("stand_ins:scaled", "missing 1 required .* 'gap'"),
            ("math:pi", "is a float, not a function"),
            ("builtins:dict", "'custom'"),  # makes something that is no network
        ],
    )
    def test_a_path_that_leads_to_no_network_is_named(self, target, message):
        with pytest.raises(ModelError, match=message):
            made("custom", target=target)

    @pytest.mark.parametrize("config", [{"name": "custom"}, {"name": "mlp", "target": "a:b"}])
    def test_a_target_belongs_to_custom_and_only_there(self, config):
        with pytest.raises(ConfigError, match=r"model\.target names a function for model=custom"):
            ModelConfig(**config)


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "near"), [("covnet", "convnet"), ("resnet8", "resnet18"), ("MLP", "mlp")]
    )
    def test_an_unknown_name_gets_the_near_miss(self, name, near):
        with pytest.raises(ModelError, match=f"unknown model '{name}'. Did you mean '{near}'"):
            made(name)

    @pytest.mark.parametrize("key", ["weights", "num_classes"])
    def test_arguments_that_are_not_the_users_are_refused(self, key):
        with pytest.raises(ModelError, match=rf"^model\.options\.{key} cannot be set: "):
            made("resnet18", (3, 32, 32), options={key: "DEFAULT"})

    @pytest.mark.parametrize(
        ("name", "options", "culprit"),
        [
            ("convnet", {"width": [8]}, "'width'"),
            ("mlp", {"groups": 2}, "'groups'"),
            ("resnet18", {"widths": [8]}, "it has no option 'widths'$"),
            ("convnet", {"widths": [10], "groups": 4}, "divisible"),
            ("convnet", {"dropout": 2.0}, "dropout probability"),
        ],
    )
    def test_options_that_it_does_not_take_are_named(self, name, options, culprit):
        with pytest.raises(ModelError, match=f"model '{name}' with options .*{culprit}"):
            made(name, (1, 32, 32), options=options)


def test_channels_last_changes_memory_and_not_the_logits():
    torch.manual_seed(0)
    plain = made("convnet")
    torch.manual_seed(0)
    last = made("convnet", channels_last=True)
    convolution = next(m for m in last.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    # float32 with sums of some hundred terms of size 1, in another order.
    torch.testing.assert_close(plain(images(3)), last(images(3)), rtol=0, atol=1e-5)


def test_compiling_is_switched_on_by_the_configuration(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    made("convnet")
    assert compiled == []
    made("convnet", compile=True)
    assert compiled == [ConvNet]


@pytest.mark.parametrize(
    ("name", "trainer", "last"),
    [
        pytest.param("convnet", {}, True, id="float32"),
        pytest.param("convnet", {"precision": "64-true"}, False, id="float64"),
        pytest.param("convnet", {"reduction": "bitwise"}, False, id="bitwise"),
        pytest.param("mlp", {}, False, id="no convolution"),
        pytest.param("resnet18", {}, False, id="as fast without it"),
        pytest.param("custom", {}, False, id="code of the user's own"),
    ],
)
def test_channels_last_is_chosen_where_it_pays(name, trainer, last):
    target = "equiloss.models.networks:ConvNet" if name == "custom" else None
    config = Config(model=ModelConfig(name=name, target=target), trainer=TrainerConfig(**trainer))
    assert (memory_order(config) == torch.channels_last) is last
    for asked in (True, False):
        config.model.channels_last = asked
        assert (memory_order(config) == torch.channels_last) is asked


def test_patches_become_channels_before_the_first_convolution() -> None:
    network, plain = ConvNet(10, 1, patch=2), ConvNet(10, 4)
    names = zip(plain.state_dict(), network.state_dict().values(), strict=True)
    plain.load_state_dict(dict(names))
    unshuffled = torch.nn.functional.pixel_unshuffle(images(3), 2)
    assert torch.equal(network(images(3)), plain(unshuffled))
    with pytest.raises(ModelError, match="patch must be 1 or more, got 0"):
        made("convnet", options={"patch": 0})
