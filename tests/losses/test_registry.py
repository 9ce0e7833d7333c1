"""Names of losses: known without importing, never overwritten, and named when they are broken."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
from torch import Tensor, nn

from equiloss.errors import LossError
from equiloss.losses import get, names, register, registry
from equiloss.losses.signature import RESERVED, read
from support import Install

FORMULATIONS = ["cross_entropy", "log_softmax_nll", "softmax_nll"]
BUILT_IN = sorted(registry._BUILT_IN)

LOSS = "def {name}(logits, target, *, factor: float = 2.0):\n    return factor * logits.sum(-1)\n"


@pytest.fixture
def plugins(install: Install) -> None:
    """A good loss, a broken one of another distribution, and one that claims a built-in name."""
    install(
        "good-losses",
        "1.2",
        "doubled = good_losses:doubled",
        good_losses=LOSS.format(name="doubled"),
    )
    install(
        "broken-losses",
        "0.3",
        "broken = broken_losses:broken",
        broken_losses="raise ZeroDivisionError('no CUDA here')\n",
    )
    install(
        "greedy-losses",
        "7.0",
        "cross_entropy = greedy_losses:cross_entropy",
        greedy_losses=LOSS.format(name="cross_entropy"),
    )


def imported() -> set[str]:
    return {"good_losses", "broken_losses", "greedy_losses"} & set(sys.modules)


class TestPlugins:
    def test_listing_imports_none(self, plugins):
        assert {*BUILT_IN, "doubled", "broken"} <= set(names())
        assert names() == sorted(set(names()))
        assert imported() == set()

    def test_choosing_imports_the_chosen_one_alone(self, plugins):
        assert get("doubled").__module__ == "good_losses"
        assert imported() == {"good_losses"}
        assert registry.signature("doubled").options["factor"].default == 2.0
        assert registry.provider("doubled").source == "good-losses 1.2"

    def test_a_broken_one_is_named_with_its_distribution_and_breaks_nothing_else(self, plugins):
        with pytest.raises(LossError) as caught:
            get("broken")
        assert str(caught.value) == (
            "loss 'broken' of broken-losses 0.3 (broken_losses:broken) cannot be imported: "
            "ZeroDivisionError: no CUDA here"
        )
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert get("softmax_nll").__name__ == "softmax_nll"
        assert get("doubled").__name__ == "doubled"

    def test_a_name_claimed_twice_names_both_sides(self, plugins):
        with pytest.raises(LossError, match="'cross_entropy' is claimed by equiloss and greedy"):
            get("cross_entropy")
        assert names().count("cross_entropy") == 1
        assert "greedy_losses" not in imported()

    def test_the_environment_switches_plugins_off(self, plugins, monkeypatch):
        monkeypatch.setenv("EQUILOSS_DISABLE_PLUGINS", "1")
        assert names() == BUILT_IN
        assert get("cross_entropy").__module__ == "equiloss.losses.formulations"
        with pytest.raises(LossError, match="unknown loss 'doubled'"):
            get("doubled")

    def test_registering_over_a_plugin_is_refused_without_importing_it(self, plugins):
        with pytest.raises(LossError, match=r"as loss 'doubled': good-losses 1\.2 provides that"):
            register(lambda logits, target: logits, name="doubled")
        assert imported() == set()

    @pytest.mark.parametrize("name", list(registry.KEPT))
    def test_a_name_that_means_something_else_is_refused_when_it_is_chosen(self, install, name):
        install("odd-losses", "0.1", f"{name} = good_losses:doubled")
        with pytest.raises(LossError, match=rf"{name!r} of odd-losses 0\.1: that name is kept for"):
            get(name)
        assert name in names()
        assert registry.provider("cross_entropy").source == "equiloss"

    def test_an_entry_point_that_leads_to_no_loss_is_named(self, install):
        install("odd-losses", "0.1", "odd = odd_losses:odd", odd_losses="odd = 3\n")
        with pytest.raises(LossError, match=r"'odd' .*odd-losses 0\.1"):
            registry.signature("odd")


def test_listing_names_imports_neither_torch_nor_a_loss():
    code = (
        "from equiloss.losses import registry; assert registry.names(); import sys; "
        "assert not {'torch', 'equiloss.losses.formulations'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestRegister:
    @pytest.fixture(autouse=True)
    def _take_back(self, monkeypatch):
        monkeypatch.setattr(registry, "_registered", {})

    def test_a_decorator_with_and_without_a_name(self):
        @register
        def mine(logits, target):
            return logits.sum(-1)

        @register(name="other")
        def _mine(logits, target):
            return logits.sum(-1)

        assert {"mine", "other"} <= set(names())
        assert get("mine") is mine
        assert get("other") is _mine
        assert registry.provider("mine").source.endswith("mine")

    def test_unregister_takes_it_back(self):
        def mine(logits, target):
            return logits.sum(-1)

        register(mine)
        registry.unregister("mine")
        assert "mine" not in names()
        register(mine)  # and the name is free again
        with pytest.raises(LossError, match="unknown registered loss 'cross_entropy'"):
            registry.unregister("cross_entropy")

    def test_nothing_is_ever_overwritten(self):
        def softmax_nll(logits, target):
            return logits.sum(-1)

        with pytest.raises(LossError, match=r"cannot register .*:.*softmax_nll as .* equiloss"):
            register(softmax_nll)
        register(softmax_nll, name="mine")
        with pytest.raises(LossError, match=r"as loss 'mine': .*softmax_nll provides that name"):
            register(lambda logits, target: logits.sum(-1), name="mine")
        assert get("mine") is softmax_nll
        assert get("softmax_nll").__module__ == "equiloss.losses.formulations"

    @pytest.mark.parametrize("name", ["custom", "invariance", "losses"])
    def test_names_that_mean_something_else_are_kept(self, name):
        with pytest.raises(LossError, match=f"as loss {name!r}: that name is kept for"):
            register(lambda logits, target: logits.sum(-1), name=name)

    def test_an_unknown_name_gets_the_near_miss_and_the_choices(self):
        with pytest.raises(LossError) as caught:
            get("cross_entopy")
        message = str(caught.value)
        assert message.startswith("unknown loss 'cross_entopy'. Did you mean 'cross_entropy'?")
        assert all(name in message for name in BUILT_IN)

    def test_what_is_no_loss_is_not_registered(self):
        with pytest.raises(LossError, match=r"\(prediction, target\): a loss is written"):
            register(lambda prediction, target: prediction, name="mine")
        assert "mine" not in names()


class TestSignature:
    @pytest.mark.parametrize("name", FORMULATIONS)
    def test_the_formulations_can_do_everything_pytorch_can(self, name):
        signature = registry.signature(name)
        assert signature.supported == {"weight", "ignore_index", "label_smoothing"}
        assert signature.soft_targets
        assert signature.is_shift_invariant()
        defaults = {key: option.default for key, option in signature.options.items()}
        assert (
            defaults.items()
            >= {
                "weight": None,
                "ignore_index": -100,
                "label_smoothing": 0.0,
            }.items()
        )

    def test_shift_invariance_may_depend_on_the_options(self):
        signature = registry.signature("cross_entropy")
        assert signature.is_shift_invariant({"label_smoothing": 0.1})
        assert not signature.is_shift_invariant({"z_loss": 1e-4})
        assert not registry.signature("sigmoid_bce").is_shift_invariant()

        def plain(logits, target): ...

        assert read("plain", plain).is_shift_invariant()
        plain.shift_invariant = False
        assert not read("plain", plain).is_shift_invariant({})

    def test_what_only_an_attribute_says(self):
        assert registry.signature("balanced_softmax").min_class_count == 1
        assert registry.signature("cross_entropy").min_class_count == 0
        assert "ICCV 2017" in registry.signature("focal").reference
        assert read("plain", lambda logits, target: ...).reference is None

    def test_capabilities_are_the_reserved_names(self):
        def loss(logits, target, *, weight=None, class_counts, gamma: float): ...

        signature = read("loss", loss)
        assert signature.supported == {"weight", "class_counts"} < set(RESERVED)
        # The class counts come from the training set, not from a configuration.
        assert list(signature.options) == ["weight", "gamma"]

    def test_options_have_the_types_that_are_written(self):
        def loss(
            logits: Tensor,
            target: Tensor,
            *,
            a: float = 1,
            b: int | None = None,
            c: Literal["x", "y"] = "x",
            d: list[float] = (),
            e=True,
        ) -> Tensor: ...

        options = read("loss", loss).options
        assert options["a"].annotation is float
        assert options["b"].annotation == int | None
        assert (options["c"].annotation, options["c"].choices) == (str, ("x", "y"))
        assert options["e"].annotation is bool  # from the default

    def test_an_annotation_that_cannot_be_resolved_costs_the_annotations_alone(self):
        def loss(logits, target, *, a: NoSuchType = 1.5, b: int = 2): ...  # noqa: F821

        options = read("loss", loss).options
        assert [options[key].annotation for key in "ab"] == [float, int]

    def test_domain_is_a_number_for_each_type(self):
        import torch

        assert registry.signature("cross_entropy").domain(torch.float32) == float("inf")
        assert registry.signature("softmax_nll").domain(torch.float32) < 88

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda target, logits: ..., r"\(target, logits\)"),
            (lambda logits: ..., r"\(logits\)"),
            (lambda logits, target, gamma: ..., "being keyword-only"),
            (lambda logits, target, **options: ..., r"takes \*options: name every option"),
            (lambda logits, target, *gamma: ..., r"takes \*gamma"),
        ],
    )
    def test_what_is_no_loss_is_refused(self, loss, message):
        with pytest.raises(LossError, match=message):
            read("mine", loss)

    def test_a_module_class_has_options_in_init_and_reserved_names_in_forward(self):
        class Loss(nn.Module):
            def __init__(self, *, gamma: float = 2.0) -> None:
                super().__init__()

            def forward(self, logits, target, *, ignore_index: int = -1): ...

        signature = read("loss", Loss)
        assert list(signature.options) == ["gamma", "ignore_index"]
        assert signature.supported == {"ignore_index"}

    def test_a_module_class_without_options_needs_no_init(self):
        class Loss(nn.Module):
            def forward(self, logits, target): ...

        assert read("loss", Loss).options == {}

    def test_nor_does_it_once_torch_has_compiled_something(self, monkeypatch):
        """torch.compile wraps nn.Module.__init__ for good."""

        def wrapped(self, *args, **options):
            made(self, *args, **options)

        made = nn.Module.__init__
        monkeypatch.setattr(nn.Module, "__init__", wrapped)

        class Loss(nn.Module):
            def forward(self, logits, target): ...

        assert read("loss", Loss).options == {}

    def test_reserved_names_in_a_modules_init_are_refused(self):
        """They would never arrive: the criterion passes them to forward."""

        class Loss(nn.Module):
            def __init__(self, *, label_smoothing: float = 0.0) -> None:
                super().__init__()

            def forward(self, logits, target): ...

        with pytest.raises(LossError, match="label_smoothing"):
            read("loss", Loss)

    def test_options_in_a_modules_forward_are_refused(self):
        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()

            def forward(self, logits, target, *, gamma: float = 2.0): ...

        with pytest.raises(LossError, match="gamma"):
            read("loss", Loss)

    def test_the_key_of_the_configuration_itself_is_refused(self):
        def loss(logits, target, *, name: str = "x"): ...

        with pytest.raises(LossError, match="'name'"):
            read("loss", loss)
