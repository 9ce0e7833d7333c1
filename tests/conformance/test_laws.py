"""The laws of a loss: what they let pass, and what they catch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_like
from equiloss.conformance import Conformance, Status, verify, verify_all
from equiloss.conformance.laws import LAWS
from equiloss.conformance.ranks import check_ranks
from equiloss.conformance.subject import Subject
from equiloss.errors import LossError
from equiloss.losses import Criterion, get, registry
from equiloss.losses.projection import Projection
from equiloss.testing import assert_loss_conforms
from support import ROOT, TESTS, slow

# Each loss of tests/plugin, and the one law that it breaks.
BROKEN = {
    "import_error": "loads",
    "wrong_signature": "loads",
    "scalar": "shape",
    "column": "shape",
    "always_float32": "shape",
    "not_a_number": "finite",
    "needs_a_row": "sizes",
    "in_place": "pure",
    "in_place_target": "pure",
    "noisy": "repeatable",
    "detached": "attached",
    "mean_everywhere": "unreduced",
    "divided_by_rows": "unreduced",
    "hard_examples": "independence",
    "half_detached": "gradient",
    "frozen_parameter": "parameters",
    "forgetful": "parameters",
    "detached_head": "head",
    "without_bias": "head",
    "infinite": "extremes",
    "infinite_gradient": "extremes",
    "penalty": "shift",
    "unwritten_choice": "options",
    "swallows": "options",
    "another_default": "options",
    "soft_mean": "soft targets",
    "falsy_smoothing": "label smoothing",
    "other_classes": "label smoothing",
    "normalised_weight": "weight",
    "predicted_weight": "weight",
    "smoothed_ignored": "ignored rows",
    "fixed_ignored": "ignored rows",
    "soft_batch_weight": "combinations",
    "dtype_of_parameter": "promotion",
    "bfloat16_inside": "accuracy",
    "wrong_vmap": "per sample gradients",
    "other_when_compiled": "compiled",
    "mean_of_ranks": "ranks",
}


def statuses(verdict: Conformance) -> dict[str, Status]:
    return {outcome.law.name: outcome.status for outcome in verdict.outcomes}


def dependants(name: str) -> set[str]:
    """Laws that need this one, or one that needs it."""
    found = {name}
    for law in LAWS:
        if any(needed.name in found for needed in law.needs):
            found.add(law.name)
    return found - {name}


def test_the_order_of_the_laws_is_that_of_their_needs():
    places = {law: place for place, law in enumerate(LAWS)}
    assert len(places) == len({law.name for law in LAWS}) == len(LAWS)
    for law in LAWS:
        assert all(places[needed] < places[law] for needed in law.needs)


def test_the_built_in_losses_the_template_and_one_with_parameters_conform(monkeypatch):
    monkeypatch.setenv("EQUILOSS_DISABLE_PLUGINS", "1")
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugin" / "src")
    of_logits = [name for name in registry.names() if not registry.signature(name).wants_features]
    template = "equiloss_taylor:taylor_cross_entropy"
    verdicts = verify_all([*of_logits, template, torch_like.LearnedTemperature])
    assert [str(verdict) for verdict in verdicts if not verdict.holds] == []
    found = {verdict.name: statuses(verdict) for verdict in verdicts}
    not_applicable = {
        name: {law for law, status in laws.items() if status != Status.HOLDS}
        for name, laws in found.items()
    }
    assert not_applicable["cross_entropy"] == {"parameters", "head"}
    assert not_applicable["LearnedTemperature"] == {
        *("head", "soft targets", "label smoothing", "weight", "ignored rows", "combinations")
    }


@slow
def test_a_built_in_loss_of_features_conforms():
    """Slow: torch's function imports its compiler in each process."""
    verdict = verify("linear_cross_entropy")
    assert verdict.holds, str(verdict)
    assert statuses(verdict)["head"] == Status.HOLDS


class TestLossesOfTorch:
    """They are adapted as `loss=custom` adapts them."""

    def test_one_that_is_per_sample_passes(self):
        verdict = verify(F.multi_margin_loss, margin=0.75)
        assert verdict.holds, str(verdict)
        assert statuses(verdict)["weight"] == Status.DOES_NOT_APPLY

    def test_one_by_its_path(self):
        verdict = verify("torch.nn.functional:cross_entropy")
        assert verdict.holds, str(verdict)
        assert statuses(verdict)["soft targets"] == Status.HOLDS


def test_each_mutant_is_caught_by_its_law_alone(mutants):
    assert set(mutants) == set(BROKEN)
    assert set(BROKEN.values()) == {law.name for law in LAWS}
    verdicts = verify_all(mutants)
    broken = {v.name: [outcome.law.name for outcome in v.broken] for v in verdicts}
    assert broken == {name: [law] for name, law in BROKEN.items()}
    for verdict in verdicts:
        found = statuses(verdict)
        law = BROKEN[verdict.name]
        not_run = {name for name, status in found.items() if status == Status.NOT_RUN}
        assert not_run == dependants(law)
        (first,) = verdict.broken
        assert first.law.sentence in str(verdict)
        example = first.example
        assert example is not None
        if example.code:
            rows, classes = shown_shape(example.code)
            assert rows <= 3
            assert classes <= 2
            if example.expected and law != "attached":
                run_code(verdict)
            else:
                with pytest.raises(Exception, match=re.escape(example.got.partition(": ")[2])):
                    run_code(verdict)
    assert json.dumps([verdict.as_dict() for verdict in verdicts])


@slow
def test_the_mutants_are_a_distribution_that_installs(tmp_path, mutants):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    pip = [sys.executable, "-m", "pip", "install", *options, str(TESTS / "plugin")]
    subprocess.run(pip, check=True, timeout=120)
    (info,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert (info.name, info.version) == ("equiloss-mutants", "0.1")
    assert sorted(entry.name for entry in info.entry_points) == sorted(mutants)


def shown_shape(code: str) -> tuple[int, int]:
    """Rows and classes of a counter-example."""
    names: dict[str, Any] = {"torch": torch}
    tensors = (line for line in code.splitlines() if re.match(r"\w+ = torch\.", line))
    exec("\n".join(tensors), names)
    classes = names["logits"].shape[1] if "logits" in names else len(names["head_weight"])
    return len(names["target"]), classes


def run_code(verdict: Conformance, **names: Any) -> Tensor:
    """The losses of the first counter-example, by its own code."""
    example = verdict.broken[0].example
    assert example is not None
    known = {"torch": torch, "Criterion": Criterion, "Projection": Projection, "get": get}
    scope = known | names
    exec(example.code, scope)
    losses: Tensor = scope["losses"]
    return losses


class TestCounterExamples:
    def test_the_code_gives_what_was_got(self):
        def doubtful(logits, target, *, weight=None):
            """Right for weights that are all the same."""
            losses = F.cross_entropy(logits, target, weight, reduction="none")
            return losses if weight is None else losses / weight.max()

        verdict = verify(doubtful)
        assert verdict.broken[0].law.name == "weight"
        example = verdict.broken[0].example
        assert example is not None
        assert run_code(verdict, doubtful=doubtful).tolist() == json.loads(example.got)
        assert "weight=[2.0, 2.0]" in example.code
        assert f"expected {example.expected}" in str(verdict)

    def test_only_what_is_needed_to_break_the_law_is_left(self):
        """From many rows and classes to the two that matter, and to round numbers."""

        def rare(logits, target):
            losses = F.cross_entropy(logits, target, reduction="none")
            return torch.where((logits[:, 2] > 1.5) & (target == 1), torch.nan, losses)

        verdict = verify(rare)
        assert verdict.broken[0].law.name == "finite"
        example = verdict.broken[0].example
        assert example is not None
        assert example.code.splitlines()[:2] == [
            "logits = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)",
            "target = torch.tensor([1])",
        ]

    def test_an_error_of_the_loss_is_told(self):
        def shy(logits, target):
            if len(logits) > 2:
                raise ZeroDivisionError("more than two\nrows")
            return F.cross_entropy(logits, target, reduction="none")

        verdict = verify(shy)
        assert verdict.broken[0].law.name == "shape"
        assert "error: ZeroDivisionError: more than two" in str(verdict)
        assert shown_shape(verdict.broken[0].example.code) == (3, 2)  # type: ignore[union-attr]


def in_one_process(loss: Any) -> Any:
    """Without a name that another process could import: the law of ranks takes seconds."""
    loss.__qualname__ = f"<locals>.{loss.__name__}"
    return loss


@in_one_process
def within_six(logits, target):
    """Right where logits spread by up to 6."""
    losses = F.cross_entropy(logits, target, reduction="none")
    return torch.where(logits.logsumexp(-1) - logits.amin(-1) > 6, torch.nan, losses)


within_six.max_logit_range = 6.0


@in_one_process
def z_loss(logits, target, *, z: float = 1e-3):
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses + z * logits.logsumexp(-1).square()


z_loss.shift_invariant = lambda options: options["z"] == 0


@in_one_process
def smoothed(logits, target, *, label_smoothing: float = 0.1, ignore_index: int = -1):
    """With defaults of its own."""
    return F.cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


@in_one_process
class PerClass(nn.Module):
    """A learned scale for each of so many classes."""

    shift_invariant = False

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(num_classes) + 0.5)

    def forward(self, logits, target):
        return F.cross_entropy(logits * self.scale, target, reduction="none")


@in_one_process
def reads_data(logits, target, *, factor: float, unused: float = 1.0):
    """It looks at the values, and has an option for nothing."""
    losses = F.cross_entropy(logits, target, reduction="none")
    if len(target) and target.max() < 0:
        return losses
    return factor * losses


class TestWhatALossSaysOfItself:
    def test_is_what_it_is_held_against(self):
        verdicts = verify_all([within_six, z_loss, smoothed])
        verdicts += verify_all([PerClass], {"num_classes": 7})
        assert [str(verdict) for verdict in verdicts if not verdict.holds] == []
        found = {verdict.name: statuses(verdict) for verdict in verdicts}
        assert found["within_six"]["extremes"] == Status.HOLDS
        assert found["z_loss"]["shift"] == Status.DOES_NOT_APPLY
        assert found["smoothed"]["label smoothing"] == Status.HOLDS
        assert found["PerClass"]["parameters"] == Status.HOLDS
        assert {laws["ranks"] for laws in found.values()} == {Status.DOES_NOT_APPLY}
        assert "another process cannot import it" in verdicts[0].outcomes[-1].remark

    @pytest.mark.parametrize(
        ("attribute", "broken"),
        [("max_logit_range", "finite"), ("shift_invariant", "shift")],
    )
    def test_matters(self, monkeypatch, attribute, broken):
        loss = {"max_logit_range": within_six, "shift_invariant": z_loss}[attribute]
        monkeypatch.delattr(loss, attribute)
        assert verify(loss).broken[0].law.name == broken

    def test_depends_on_its_options(self):
        assert statuses(verify(z_loss, z=0.0))["shift"] == Status.HOLDS

    def test_what_is_noteworthy_is_no_breach(self):
        verdict = verify(reads_data, factor=2.0)
        assert verdict.holds
        remarks = {outcome.law.name: outcome.remark for outcome in verdict.outcomes}
        assert remarks["options"] == "no other value of unused that was tried changed the loss"
        assert remarks["per sample gradients"].startswith("torch.func cannot map it: vmap: It")

    def test_an_option_without_a_value_is_named(self):
        verdict = verify(reads_data)
        assert "loss 'reads_data' requires loss.factor" in str(verdict)
        assert verdict.broken[0].law.name == "loads"


class TestOptions:
    def test_an_unknown_one_gets_the_near_miss(self):
        with pytest.raises(LossError, match=r"option of loss 'z_loss' 'zz'\. Did you mean 'z'"):
            verify(z_loss, zz=1.0)

    @pytest.mark.parametrize("key", ["weight", "label_smoothing", "ignore_index"])
    def test_what_the_laws_vary_cannot_be_given(self, key):
        with pytest.raises(LossError, match=f"verified with every {key}"):
            verify("cross_entropy", **{key: 0})

    def test_an_unknown_loss_gets_the_near_miss(self):
        with pytest.raises(LossError, match="Did you mean 'cross_entropy'"):
            verify("cross_entopy")


class TestAssertLossConforms:
    def test_a_right_loss_passes(self):
        assert_loss_conforms(within_six)

    def test_a_wrong_one_fails_with_the_law_and_the_counter_example(self, mutants):
        with pytest.raises(AssertionError) as caught:
            assert_loss_conforms("half_detached", gamma=1.0)
        message = str(caught.value)
        assert message.startswith("half_detached, gamma=1.0 BREAKS A LAW (25 laws: ")
        assert "gradient: The gradient is the derivative of the loss" in message
        assert "losses = Criterion('half_detached', gamma=1.0).per_sample(logits" in message
        assert "gradient: got [[-0.25, 0.25]], expected [[-0.423287, 0.423287]]" in message


class TestRanks:
    def test_a_loss_that_ends_its_process_breaks_no_other(self):
        losses = [torch_like.doubled, torch_like.ends_its_process, torch_like.raises_on_a_rank]
        subjects = [Subject(loss.__name__, loss, {}, registered=False) for loss in losses]
        right, ended, raised = check_ranks(subjects)
        assert right is None
        assert "on 1 processes, " in str(ended)
        assert "rank 0 died without a word" in str(ended)
        assert "error of rank 1 on 2 processes" in str(raised)
        assert str(raised).endswith("LookupError: not here")
