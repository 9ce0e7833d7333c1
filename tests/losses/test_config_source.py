"""Losses as Hydra config nodes: made from signatures, typed, and never hidden by a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from equiloss.config import resolved
from equiloss.errors import ConfigError, LossError
from equiloss.losses import Criterion, config_source, registry
from equiloss.losses.config_source import LossConfigSource
from equiloss.records import remembered

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str, conf: Path = CONF) -> DictConfig:
    """The configuration as `train.py` would get it, before it is resolved."""
    resolved.register_schema()
    config_source.install()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def compose_loss(*overrides: str, conf: Path = CONF) -> Any:
    return composed(*overrides, conf=conf).loss


def plain(node: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return values


@pytest.fixture
def plugin() -> Iterator[str]:
    """A registered loss with options of every kind."""

    @registry.register(name="focal_for_tests")
    def focal(
        logits,
        target,
        *,
        gamma: float,
        alpha: float | None = None,
        steps: int = 3,
        hard: bool = False,
        kind: Literal["sum", "max"] = "sum",
        betas: tuple[float, ...] = (0.5, 1.0),
        ignore_index: int = -100,
    ):
        return logits.sum(-1)

    yield "focal_for_tests"
    registry.unregister("focal_for_tests")


FORMULATION = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}
CROSS_ENTROPY = {**FORMULATION, "z_loss": 0.0}


class TestNodes:
    @pytest.mark.parametrize("name", ["softmax_nll", "log_softmax_nll"])
    def test_every_formulation_has_one(self, name):
        assert plain(compose_loss(f"loss={name}")) == {"name": name, **FORMULATION}
        assert plain(compose_loss("loss=cross_entropy")).keys() == {"name", *CROSS_ENTROPY}

    @pytest.mark.parametrize(
        ("override", "value"),
        [("loss=poly1 loss.epsilon=2", 2.0), ("loss=bi_tempered loss.t1=0.5", 0.5)],
    )
    def test_a_loss_of_the_shelf_has_one(self, override, value):
        loss, option = override.split()
        node = compose_loss(loss, option)
        assert node[option.partition("=")[0].removeprefix("loss.")] == value
        assert isinstance(plain(node)["name"], str)

    def test_class_counts_are_no_option(self):
        node = plain(compose_loss("loss=balanced_softmax"))
        assert node == {"name": "balanced_softmax", **FORMULATION}

    def test_the_default_is_cross_entropy(self):
        assert compose_loss().name == "cross_entropy"

    def test_options_are_set_on_the_command_line(self):
        node = compose_loss("loss=softmax_nll", "loss.label_smoothing=0.1", "loss.weight=[1,2]")
        assert plain(node) == {
            "name": "softmax_nll",
            "weight": [1, 2],
            "ignore_index": -100,
            "label_smoothing": 0.1,
        }

    def test_a_node_is_what_the_criterion_takes(self):
        node = plain(compose_loss("loss=log_softmax_nll", "loss.label_smoothing=0.2"))
        criterion = Criterion(**node)
        assert {"name": criterion.name, **criterion.options} == node

    def test_a_plugin_has_one_from_its_signature(self, plugin):
        node = compose_loss(f"loss={plugin}", "loss.gamma=2", "loss.kind=max", "loss.alpha=0.5")
        assert plain(node) == {
            "name": plugin,
            "gamma": 2.0,
            "alpha": 0.5,
            "steps": 3,
            "hard": False,
            "kind": "max",
            "betas": [0.5, 1.0],
            "ignore_index": -100,
        }
        assert isinstance(node.gamma, float)

    def test_a_required_option_stays_missing_and_is_named(self, plugin):
        with pytest.raises(ConfigError, match=r"^missing value: loss\.gamma$"):
            resolved.resolve(composed(f"loss={plugin}"))

    @pytest.mark.parametrize(
        ("override", "culprit"),
        [
            ("loss.gamma=two", "'two' of type 'str' could not be converted to Float"),
            ("loss.steps=1.5", "'1.5' of type 'float' could not be converted to Integer"),
            ("loss.hard=perhaps", "'perhaps' is not a valid bool"),
            ("loss.gamm=2", "gamm"),
        ],
    )
    def test_a_value_of_the_wrong_type_and_an_unknown_option_are_refused(
        self, plugin, override, culprit
    ):
        with pytest.raises(ConfigCompositionException) as caught:
            compose_loss(f"loss={plugin}", override)
        assert culprit in f"{caught.value} {caught.value.__cause__}"

    def test_a_value_outside_the_choices_is_refused(self, plugin):
        node = compose_loss(f"loss={plugin}", "loss.gamma=2", "loss.kind=mix")
        with pytest.raises(LossError, match=r"loss\.kind 'mix'\. Did you mean 'max'"):
            Criterion(**plain(node))

    def test_an_unknown_loss_is_refused_with_the_choices(self):
        with pytest.raises(MissingConfigException) as caught:
            compose_loss("loss=cross_entopy")
        assert "cross_entopy" in str(caught.value)
        assert {"cross_entropy", "softmax_nll", "label_smoothing", "custom"} <= set(
            caught.value.options
        )


def with_types(
    logits: Tensor,
    target: Tensor,
    *,
    factor: float = 1.0,
    powers: list[float] = [2.0],  # noqa: B006
    table: dict[str, float] = {"a": 1.0, "b": 2.0},  # noqa: B006
    steps: int = 2,
) -> Tensor:
    return logits.sum(-1)


class TestCustom:
    def test_options_of_any_name(self, monkeypatch, tmp_path):
        (tmp_path / "losses_by_path.py").write_text(
            "def scaled(logits, target, *, factor: float = 1.0):\n"
            "    return factor * logits.sum(-1)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        node = compose_loss(
            "loss=custom", "loss.target=losses_by_path:scaled", "loss.options={factor: 3}"
        )
        assert plain(node) == {
            "name": "custom",
            "target": "losses_by_path:scaled",
            "options": {"factor": 3},
        }
        assert Criterion(**plain(node)).options == {"factor": 3}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"factor": 2, "powers": [1, 2]}, {"factor": 2.0, "powers": [1.0, 2.0]}),
            ({"table": {"b": 3}}, {"table": {"a": 1.0, "b": 3.0}}),  # merged, as a registered one's
            ({"factor": "two"}, r"loss\.options\.factor: Value 'two' .* could not be converted"),
            ({"powers": [1, "b"]}, r"loss\.options\.powers\[1\]: Value 'b'"),
            ({"table": {"a": "x"}}, r"loss\.options\.table\.a: Value 'x'"),
            ({"steps": 1.5}, r"loss\.options\.steps: Value '1\.5'"),
        ],
    )
    def test_options_have_the_types_of_the_signature(self, given, expected):
        def make() -> Criterion:
            return Criterion("custom", target=f"{__name__}:with_types", options=given)

        if isinstance(expected, str):
            with pytest.raises(LossError, match=expected):
                make()
        else:
            defaults = {"factor": 1.0, "powers": [2.0], "table": {"a": 1.0, "b": 2.0}, "steps": 2}
            got = make().options
            assert {**defaults, **got} == {**defaults, **expected}
            assert all(isinstance(value, float) for value in got.get("powers", []))

    def test_the_target_is_required(self):
        with pytest.raises(ConfigError, match=r"^missing value: loss\.target \(such as "):
            resolved.resolve(composed("loss=custom"))


class TestVariants:
    """Files in conf/loss have names of their own, and a registered node in their defaults."""

    @pytest.mark.parametrize(
        ("variant", "difference"),
        [("label_smoothing", {"label_smoothing": 0.1}), ("balanced", {"weight": "balanced"})],
    )
    def test_a_variant_is_cross_entropy_with_a_difference(self, variant, difference):
        expected = {"name": "cross_entropy", **CROSS_ENTROPY, **difference}
        assert plain(compose_loss(f"loss={variant}")) == expected

    def test_every_variant_composes_and_is_typed(self):
        variants = [file.stem for file in (CONF / "loss").glob("*.yaml")]
        assert variants
        for variant in variants:
            assert compose_loss(f"loss={variant}").name in registry.names()
            with pytest.raises(ConfigCompositionException):
                compose_loss(f"loss={variant}", "loss.ignore_index=none of them")

    @pytest.mark.parametrize("hidden", ["cross_entropy", "custom", "focal_for_tests"])
    def test_a_file_that_hides_a_loss_is_refused_naming_both_sides(self, tmp_path, plugin, hidden):
        conf = shutil.copytree(CONF, tmp_path / "conf")
        file = conf / "loss" / f"{hidden}.yaml"
        file.write_text("label_smoothing: 0.5\n")
        with pytest.raises(LossError) as caught:
            compose_loss(conf=conf)
        assert f"{file} would hide the loss '{hidden}' of " in str(caught.value)

    def test_a_directory_that_the_user_adds_hides_nothing_either(self, tmp_path):
        (tmp_path / "loss").mkdir()
        (tmp_path / "loss" / "cross_entropy.yaml").write_text("name: softmax_nll\n")
        node = compose_loss(f"hydra.searchpath=[file://{tmp_path}]")
        assert plain(node) == {"name": "cross_entropy", **CROSS_ENTROPY}


class TestSource:
    def test_listing_a_group_imports_no_loss(self, monkeypatch):
        def no_import(name: str) -> None:
            raise AssertionError(f"{name} was imported")

        monkeypatch.setattr(registry, "get", no_import)
        source = LossConfigSource("equiloss", "equiloss-losses://")
        for results_filter in (ObjectType.CONFIG, None):
            assert source.list("loss", results_filter) == [*registry.names(), "custom"]
        assert source.list("", ObjectType.GROUP) == ["loss"]
        assert source.list("loss", ObjectType.GROUP) == []
        assert source.list("model", None) == []
        assert source.is_group("loss")
        assert not source.is_group("loss/cross_entropy")
        assert source.is_config("loss/cross_entropy")
        assert source.is_config("loss/cross_entropy.yaml")
        assert not source.is_config("loss")
        assert not source.is_config("model/cross_entropy")

    def test_a_plugin_that_takes_the_name_of_losses_by_import_path_changes_nothing(self, install):
        install("odd-losses", "0.1", "custom = odd_losses:odd")
        source = LossConfigSource("equiloss", "equiloss-losses://")
        assert source.list("loss", None).count("custom") == 1
        node = compose_loss("loss=custom", "loss.target=torch_like:doubled")
        assert plain(node) == {"name": "custom", "target": "torch_like:doubled", "options": {}}

    def test_choosing_imports_one(self, monkeypatch, tmp_path):
        monkeypatch.setenv(remembered.CACHE, str(tmp_path))
        chosen = []
        get = registry.get
        monkeypatch.setattr(registry, "get", lambda name: chosen.append(name) or get(name))
        compose_loss("loss=softmax_nll")
        assert set(chosen) == {"softmax_nll"}

    def test_installing_twice_is_installing_once(self):
        config_source.install()
        config_source.install()
        assert compose_loss("loss=softmax_nll").name == "softmax_nll"
