"""Networks of timm: by name, with its own weights, and with the promise kept."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equiloss.config import ModelConfig
from equiloss.distributed import collectives
from equiloss.errors import ModelError, UserError
from equiloss.models import batch_norm, timm, weights
from equiloss.models.build import build_network
from equiloss.models.dropout import RowKeys
from equiloss.models.head import expose_head, features_and_head
from equiloss.preflight.behaviour import look
from support import wrong_with

# Some 100,000 parameters each.
CONVOLUTIONS, ATTENTION = "test_efficientnet", "test_vit"
SHAPE = (3, 32, 32)


def network(
    name: str, classes: int = 5, channels: int = 3, keys: RowKeys | None = None, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    options |= {"img_size": 32} if name == ATTENTION else {}
    config = ModelConfig(name=name, library="timm", options=options)
    return build_network(
        config,
        num_classes=classes,
        image_shape=(channels, 32, 32),
        row_keys=keys or RowKeys(0),
    )


def images(rows: int, channels: int = 3) -> Tensor:
    return torch.randn(rows, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def refused(config: ModelConfig) -> str:
    """The line that a user is shown when weights are asked for."""
    with pytest.raises(UserError) as caught:
        weights.fetch(config)
    line = str(caught.value)
    assert wrong_with(line) is None
    return line


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of torch's cache and of huggingface_hub's, both empty."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


class TestByName:
    @pytest.mark.parametrize("name", [CONVOLUTIONS, ATTENTION, "test_resnet.r160_in1k"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_one_logit_per_class(self, name: str, channels: int) -> None:
        model = network(name, channels=channels)
        assert model(images(2, channels)).shape == (2, 5)

    def test_the_library_decides_whose_a_name_is(self) -> None:
        of_timm = network("resnet18")
        config = ModelConfig(name="resnet18")
        own = build_network(config, num_classes=5, image_shape=SHAPE, row_keys=RowKeys(0))
        assert type(of_timm).__module__.startswith("timm.")
        assert type(own).__module__.startswith("torchvision.")

    @pytest.mark.parametrize("name", ["resnet188", "hf-hub:timm/x", "convnet", "a/resnet18"])
    def test_an_unknown_name_gets_the_near_miss_and_no_hub_is_asked(self, name: str) -> None:
        with pytest.raises(ModelError, match=rf"^unknown model of timm '{name}'") as caught:
            network(name)
        assert ("Did you mean 'resnet18'" in str(caught.value)) == name.endswith(
            ("188", "/resnet18")
        )

    def test_a_name_that_only_timm_has_is_pointed_out(self) -> None:
        with pytest.raises(ModelError, match=r"; timm has it: model=timm model\.name=test_vit$"):
            build_network(
                ModelConfig(name="test_vit"), num_classes=5, image_shape=SHAPE, row_keys=RowKeys(0)
            )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"pretrained": True}, r"model\.options\.pretrained cannot be set: model\.weights"),
            ({"checkpoint_path": "a"}, r"options\.checkpoint_path cannot be set: model\.weights"),
            ({"in_chans": 4}, r"model\.options\.in_chans cannot be set: it is the number of chan"),
            ({"depht": 4}, r"^model 'test_vit' with options .*'depht'"),
        ],
    )
    def test_options_that_it_does_not_take_are_named(
        self, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ModelError, match=words):
            network(ATTENTION, **options)

    def test_without_timm_the_way_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ModelError, match=r"not installed: pip install 'equiloss\[timm\]'$"):
            network(ATTENTION)


class TestTheSameNumbers:
    RATES = ("drop_rate", "drop_path_rate", "proj_drop_rate")

    def test_a_sample_is_dropped_alike_in_any_batch(self) -> None:
        """Values of dropout, and branches of stochastic depth."""
        keys = RowKeys(3)
        model = network(ATTENTION, keys=keys, **dict.fromkeys(self.RATES, 0.4)).double().train()
        rows, index = images(6).double(), torch.tensor([5, 0, 9, 2, 7, 4])

        def pass_of(part: list[int]) -> Tensor:
            with keys.bound_to(index[part], epoch=1), torch.no_grad():
                return model(rows[part])

        together = pass_of([0, 1, 2, 3, 4, 5])
        # Sums of some hundred terms of size 1, in another order for another number of rows.
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(pass_of([4, 1]), together[[4, 1]], **close)
        model.eval()
        assert not torch.allclose(pass_of([0, 1, 2, 3, 4, 5]), together)

    def test_the_look_finds_nothing_but_batch_norm(self) -> None:
        def found(name: str, **options: float) -> list[tuple[str, str, bool]]:
            keys = RowKeys(0)
            seen = look(network(name, keys=keys, **options), images, keys)
            return [(each.effect.value, each.module, each.batch_norm) for each in seen]

        assert found(ATTENTION, **dict.fromkeys(self.RATES, 0.4)) == []
        first = "bn1 (BatchNormAct2d)"
        assert found(CONVOLUTIONS, drop_path_rate=0.4) == [
            ("neighbours", first, True),
            ("learns", first, True),
        ]
        # Dropout within attention draws by itself, and is named.
        ((effect, module, _),) = found(ATTENTION, attn_drop_rate=0.4)
        assert (effect, module) == ("draws", "blocks.0.attn (Attention)")

    def test_batch_norm_over_ranks_keeps_its_activation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import timm.layers

        model = network(CONVOLUTIONS).double().train()
        assert not batch_norm.is_torchs(model)
        theirs = copy.deepcopy(model)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = timm.layers.BatchNormAct2d
        batch_norm.synchronise(model)
        # Two ranks of which the other has the same rows: its unbiased variance tells them from one.
        monkeypatch.setattr(collectives, "world_size", lambda: 2)
        monkeypatch.setattr(collectives, "sum_over_ranks", lambda value: 2 * value)
        rows = images(4).double()
        # Float64 rounds at 1e-16 in sums of another order, which 13 layers amplify to some 1e-14.
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(model(rows), theirs(rows.repeat(2, 1, 1, 1))[:4], **close)
        for (name, mine), (_, its) in zip(
            model.named_buffers(), theirs.named_buffers(), strict=True
        ):
            torch.testing.assert_close(mine, its, **close, msg=name)

    @pytest.mark.parametrize("name", [CONVOLUTIONS, ATTENTION, "test_convnext"])
    def test_features_are_what_the_head_is_given(self, name: str) -> None:
        model = network(name).eval()
        names = list(model.state_dict())
        expose_head(name, model, 5)
        assert list(model.state_dict()) == names
        features_of, head = features_and_head(model)
        features = features_of(images(2))
        assert features.shape == (2, head.in_features)
        assert torch.equal(head(features), model(images(2)))

    def test_a_network_of_two_heads_has_no_features(self) -> None:
        model = network("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
        with pytest.raises(ModelError, match="has no linear head that gives the logits"):
            expose_head("deit", model, 5)


class TestItsWeights:
    CONFIG = ModelConfig(name=ATTENTION, library="timm", weights="DEFAULT")

    def put(self, caches: Path, *, hub: bool) -> tuple[Path, nn.Module]:
        """Its published weights, of 1000 classes, in one of the caches."""
        from safetensors.torch import save_file

        model = network(ATTENTION, classes=1000)
        with torch.no_grad():
            model.head.bias.fill_(3)
        file = caches / "torch" / "hub" / "checkpoints" / "test_vit.r160_in1k.safetensors"
        if hub:
            repository = caches / "hub" / "models--timm--test_vit.r160_in1k"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("abc")
            file = repository / "snapshots" / "abc" / "model.safetensors"
        file.parent.mkdir(parents=True)
        save_file(model.state_dict(), file)
        return file, model

    @pytest.mark.parametrize("hub", [True, False])
    def test_they_are_taken_from_its_caches(self, hub: bool, caches: Path) -> None:
        file, before = self.put(caches, hub=hub)
        model = network(ATTENTION)
        config = ModelConfig(
            name=ATTENTION, library="timm", weights="DEFAULT", options={"img_size": 32}
        )
        nn.init.zeros_(model.patch_embed.proj.weight)
        said = weights.give(model, config, 5)
        count = len(model.state_dict()) - 2
        head = "the head is new (head.weight, head.bias)"
        assert said == f"{count} tensors from r160_in1k ({file}); {head}"
        taken = before.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, taken[name]) == (not name.startswith("head."))

    def test_a_grey_stem_is_summed(self, caches: Path) -> None:
        _, before = self.put(caches, hub=False)
        model = network(ATTENTION, channels=1)
        config = ModelConfig(
            name=ATTENTION, library="timm", weights="r160_in1k", options={"img_size": 32}
        )
        assert "patch_embed.proj.weight is summed over 3 channels" in weights.give(model, config, 5)
        stem = before.patch_embed.proj.weight.sum(dim=1, keepdim=True)
        assert torch.equal(model.patch_embed.proj.weight, stem)

    def test_a_file_that_is_not_theirs_is_named(self, caches: Path) -> None:
        from safetensors.torch import save_file

        file, _ = self.put(caches, hub=False)
        save_file({"other": torch.zeros(2)}, file)
        with pytest.raises(UserError, match=r"of model\.weights=r160_in1k, cannot be used: ") as e:
            weights.give(network(ATTENTION), self.CONFIG, 5)
        assert wrong_with(str(e.value)) is None

    def test_missing_ones_are_named_with_url_and_place(self, caches: Path) -> None:
        assert refused(self.CONFIG) == (
            "model.weights=r160_in1k is not here: put "
            "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors at "
            f"{caches}/torch/hub/checkpoints/test_vit.r160_in1k.safetensors, or have it fetched by "
            "model.download=true"
        )

    def test_a_file_under_its_former_name_is_found(self, caches: Path) -> None:
        place = caches / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        place.parent.mkdir(parents=True)
        place.write_text("weights")
        chosen = timm.published(ModelConfig(name="resnet18", library="timm", weights="tv_in1k"))
        assert chosen.file(download=False) == place

    @pytest.mark.parametrize(
        ("name", "asked", "words"),
        [
            ("test_vit", "r160", "unknown model.weights of test_vit 'r160'. Did you mean 'r160_in"),
            ("vit_tiny_patch32_224x", "DEFAULT", "unknown model of timm 'vit_tiny_patch32_224x'"),
            ("cs3darknet_s", "DEFAULT", "timm publishes no weights for cs3darknet_s: name a file"),
        ],
    )
    def test_unknown_ones_get_the_near_miss(self, name: str, asked: str, words: str) -> None:
        line = refused(ModelConfig(name=name, library="timm", weights=asked))
        assert line.startswith(words)

    def test_the_tag_of_a_name_is_the_default(self) -> None:
        config = ModelConfig(name="resnet18.tv_in1k", library="timm", weights="DEFAULT")
        assert timm.published(config).name == "tv_in1k"
