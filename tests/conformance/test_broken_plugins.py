"""Plugins that cannot be tried at all: a verdict on each of them, and on all others."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.conformance import precision, rows
from equiloss.conformance.ranks import Job, _step
from equiloss.conformance.subject import Subject
from equiloss.losses import registry
from support import Install

CLASS = """
from torch import nn
class loss(nn.Module):
    def __init__({arguments}): {body}
    def forward(self, logits, target): return logits.sum(-1)
"""

# What a plugin's module says, and what the verdict says of it.
KINDS = {
    "raises": ("raise ZeroDivisionError('today')", "ZeroDivisionError: today"),
    "exits": (
        "raise SystemExit(3)",
        "odd 1.0 (broken_exits:loss) cannot be imported: "
        "RuntimeError: it would end the process (SystemExit: 3)",
    ),
    "skips": ("class Skip(BaseException): ...\nraise Skip('now')", "(Skip: now)"),
    "lacks_package": ("import no_such_package", "No module named 'no_such_package'"),
    "unfinished": ("def loss(logits,", "SyntaxError: '(' was never closed"),
    "empty": ("other = 1", "has no attribute 'loss'"),
    "number": ("loss = 3", "is a int, not a function or class"),
    "wants_argument": (
        CLASS.format(arguments="self, margin, reduction='mean'", body="super().__init__()"),
        "loss 'broken_wants_argument' takes a 'reduction', and fails on logits [4, 3] with classes "
        "[4] and reduction='none': TypeError: loss.__init__() missing",
    ),
    "unmade": (
        CLASS.format(arguments="self", body="raise RuntimeError('no device')"),
        "RuntimeError: no device",
    ),
    "exits_when_made": (
        CLASS.format(arguments="self", body="raise SystemExit(2)"),
        "it would end the process (SystemExit: 2)",
    ),
    "odd_count": (
        "def loss(logits, target): ...\nloss.min_class_count = 'many'",
        "odd 1.0: loss 'broken_odd_count' cannot be used: ValueError: invalid literal for int()",
    ),
    "odd_range": (
        "def loss(logits, target): ...\nloss.max_logit_range = 'wide'",
        "could not convert string to float: 'wide'",
    ),
}


def test_each_kind_gets_a_verdict_of_its_own_and_hides_no_other(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {f"broken_{kind}": source for kind, (source, _) in KINDS.items()}
    names = "\n".join(f"{name} = {name}:loss" for name in modules)
    sums = "def scalar(logits, target): return logits.sum()"
    install("odd", "1.0", f"{names}\nscalar = sums:scalar", **modules, sums=sums)
    monkeypatch.setattr(registry, "_BUILT_IN", {})
    result = CliRunner().invoke(app, ["verify", "--json", "-"], catch_exceptions=False)
    assert result.exit_code == 1
    losses = {loss["name"]: loss for loss in json.loads(result.stdout)["losses"]}
    assert losses.pop("scalar")["first_broken"] == "shape"
    assert losses.keys() == modules.keys()
    for kind, (_, why) in KINDS.items():
        loss = losses[f"broken_{kind}"]
        assert loss["first_broken"] == "loads"
        assert why in loss["laws"][0]["counter_example"]["got"]


def smoothed(
    logits: Tensor, target: Tensor, *, ignore_index: int = 1, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy whose ignored class is one of the classes."""
    ignored = {} if target.is_floating_point() else {"ignore_index": ignore_index}
    return F.cross_entropy(logits, target, weight=weight, reduction="none", **ignored)


smoothed.soft_targets = True  # type: ignore[attr-defined]


def positional(logits: Tensor, target: Tensor, /, *, ignore_index: int = -100) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")


class Frozen(nn.Module):
    """Cross-entropy times a number that is learned and another that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.fixed = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.scale * self.fixed * F.cross_entropy(logits, target, reduction="none")


class TestRightLossesPass:
    """Each law holds; a breach is raised."""

    def test_accuracy_with_probabilities_beside_an_ignored_class(self) -> None:
        precision.accuracy.check(Subject("smoothed", smoothed, {}, registered=False))

    def test_purity_with_arguments_that_have_no_names(self) -> None:
        rows.pure.check(Subject("positional", positional, {}, registered=False))

    def test_ranks_with_a_frozen_parameter(self) -> None:
        subject = Subject("frozen", Frozen, {}, registered=False)
        step = _step(Job("frozen", f"{__name__}:Frozen", {}, subject.batch(3, 4), (3,)))
        assert step.error == ""
        assert sorted(step.gradients) == ["logits", "loss.scale"]


@pytest.mark.parametrize("name", ["logits", "target"])
def test_purity_still_sees_a_positional_argument_that_is_changed(name: str) -> None:
    def impure(logits: Tensor, target: Tensor, /) -> Tensor:
        losses = positional(logits.clone(), target)
        {"logits": logits, "target": target}[name].zero_().add_(1)
        return losses

    with pytest.raises(Exception, match=f"{name} after the call"):
        rows.pure.check(Subject("impure", impure, {}, registered=False))
