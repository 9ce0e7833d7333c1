"""Losses that take the head's input: linear_cross_entropy is cross_entropy of the logits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equiloss.config import ModelConfig
from equiloss.errors import LossError, ModelError
from equiloss.losses import Criterion
from equiloss.losses.projection import Projection
from equiloss.losses.signature import read
from equiloss.models.build import build_network
from equiloss.models.dropout import RowKeys
from equiloss.models.head import expose_head, features_and_head
from support import slow

IGNORED = -100


def projection(rows: int, dtype: torch.dtype, *, bias: bool = True) -> Projection:
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, 12, generator=generator, dtype=dtype)
    weight = torch.randn(7, 12, generator=generator, dtype=dtype)
    offset = torch.randn(7, generator=generator, dtype=dtype) if bias else None
    for leaf in (features, weight, offset):
        if leaf is not None:
            leaf.requires_grad_()
    return Projection(features, weight, offset)


def targets(rows: int) -> Tensor:
    target = torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(rows))
    target[1::4] = IGNORED
    return target


# Two orders of summation of 12 products, a softmax of 7 and a sum over rows.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0, 1.5, 1.0, 3.0]])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_value_and_gradients_are_those_of_cross_entropy(rows, weight, bias, dtype):
    options: dict[str, Any] = {} if weight is None else {"weight": weight}
    projected, target = projection(rows, dtype, bias=bias), targets(rows)
    leaves = [projected.rows, *projected.head().values()]
    found = Criterion("linear_cross_entropy", **options)(projected, target)
    gradients = torch.autograd.grad(found.total, leaves)
    expected = Criterion("cross_entropy", **options)(projected.logits(), target)
    torch.testing.assert_close(found.mass, expected.mass, rtol=0, atol=0)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * max(rows, 1)}
    torch.testing.assert_close(found.total, expected.total, **tolerance)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.total, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_ignored_rows_are_exactly_zero():
    projected, target = projection(8, torch.float32), torch.full((8,), IGNORED)
    found = Criterion("linear_cross_entropy")(projected, target)
    gradients = torch.autograd.grad(found.total, [projected.rows, projected.weight])
    assert found.total.item() == 0
    assert all(not gradient.any() for gradient in gradients)


def test_half_precision_is_promoted():
    given = projection(4, torch.float32)
    parts = [given.rows, *given.head().values()]
    projected = Projection(*(part.detach().bfloat16() for part in parts))
    target = targets(4)
    found = Criterion("linear_cross_entropy")(projected, target).total
    wide = Projection(*(part.detach().bfloat16().float() for part in parts))
    assert torch.equal(found, Criterion("linear_cross_entropy")(wide, target).total)


def test_smoothing_and_probabilities_are_refused():
    with pytest.raises(LossError, match="unknown option of loss 'linear_cross_entropy'"):
        Criterion("linear_cross_entropy", label_smoothing=0.1)
    projected = projection(3, torch.float32)
    with pytest.raises(LossError, match=r"takes classes \[N\], not probabilities"):
        Criterion("linear_cross_entropy")(projected, torch.full((3, 7), 1 / 7))


def test_each_kind_is_refused_the_other_kind():
    projected, target = projection(3, torch.float32), targets(3)
    with pytest.raises(LossError, match="'linear_cross_entropy' takes features and a head"):
        Criterion("linear_cross_entropy")(projected.logits(), target)
    with pytest.raises(LossError, match="'cross_entropy' takes logits"):
        Criterion("cross_entropy")(projected, target)


class TestSignature:
    def test_a_head_bias_is_no_option(self):
        def loss(features, head_weight, target, *, head_bias=None, scale: float = 1.0): ...

        signature = read("loss", loss)
        assert signature.wants_features
        assert signature.takes_head_bias
        assert list(signature.options) == ["scale"]

    def test_a_bias_that_a_loss_cannot_take_is_refused(self):
        from equiloss.losses import register
        from equiloss.losses.registry import unregister

        @register
        def without_bias(features, head_weight, target): ...

        try:
            with pytest.raises(LossError, match="takes no head_bias, and the network's head has"):
                Criterion("without_bias")(projection(3, torch.float32), targets(3))
        finally:
            unregister("without_bias")

    def test_of_logits_a_head_bias_is_an_option_like_any_other(self):
        def loss(logits, target, *, head_bias: float = 0.0): ...

        assert list(read("loss", loss).options) == ["head_bias"]


class TestNetworks:
    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t"])
    def test_a_network_of_torchvision_gets_features_and_head(self, name: str):
        size = (3, 224, 224) if name == "vit_b_16" else (3, 64, 64)
        config = ModelConfig(name=name)
        model = build_network(config, num_classes=5, image_shape=size, row_keys=RowKeys(0)).eval()
        names = list(model.state_dict())
        expose_head(name, model, 5)
        assert list(model.state_dict()) == names
        images = torch.randn(2, *size)
        features_of, head = features_and_head(model)
        features = features_of(images)
        assert features.ndim == 2
        assert torch.equal(head(features), model(images))

    def test_a_network_without_a_linear_head_is_refused(self):
        config = ModelConfig(name="squeezenet1_1")
        model = build_network(config, num_classes=5, image_shape=(3, 64, 64), row_keys=RowKeys(0))
        with pytest.raises(ModelError, match="'squeezenet1_1' has no linear head"):
            expose_head("squeezenet1_1", model, 5)

    def test_compiled_features_are_the_same(self):
        model = nn.Module()
        model.head = nn.Linear(3, 2)
        model.forward_features = torch.nn.Identity()
        expose_head("own", model, 2, compiled=True)
        images = torch.randn(2, 3)
        features_of, head = features_and_head(model)
        assert torch.equal(features_of(images), images)
        assert features_of is not model.forward_features
        assert head is model.head


FAST = ("data.max_samples=100", "trainer.max_steps=8", "parity.every_n_steps=3", "logger=csv")
LINEAR = "loss=linear_cross_entropy"


def test_logits_are_made_at_parity_steps_alone(run_here, monkeypatch):
    training: list[bool] = []
    original = Projection.logits

    def counted(self: Projection) -> Tensor:
        # In evaluations metrics need the logits.
        training.append(torch.is_grad_enabled())
        return original(self)

    monkeypatch.setattr(Projection, "logits", counted)
    result = run_here(LINEAR, *FAST)
    assert result.parity["agree"]
    assert result.parity["steps"] == 4  # 0, 3, 6 and the last, 7
    assert sum(training) == 4


def test_training_with_it_is_training_with_cross_entropy(run_here, tmp_path):
    exact = ("trainer.precision=64-true", "loss.weight=balanced", *FAST)
    found = run_here(LINEAR, *exact, directory=tmp_path / "linear")
    expected = run_here("loss=cross_entropy", *exact, directory=tmp_path / "plain")
    for name in ("train/loss", "val/loss", "test/loss", "test/ece"):
        # Eight float64 steps.
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-12)


def test_it_does_not_depend_on_micro_batches(run_here, tmp_path):
    exact = ("trainer.precision=64-true", "loss.weight=balanced", *FAST)
    whole = run_here(LINEAR, *exact, directory=tmp_path / "whole")
    parts = run_here(LINEAR, *exact, "trainer.micro_batch_size=7", directory=tmp_path / "parts")
    assert parts.parity["agree"]
    assert parts.metrics["train/loss"] == pytest.approx(whole.metrics["train/loss"], rel=1e-12)


def test_as_a_formulation_it_is_refused(run_here):
    with pytest.raises(LossError, match="'linear_cross_entropy' takes features, not logits"):
        run_here("parity.formulations=[linear_cross_entropy]", *FAST)


MEASURE = """
import re, sys
from pathlib import Path

import torch
from equiloss.losses import Criterion
from equiloss.losses.projection import Projection

generator = torch.Generator().manual_seed(0)
features = torch.randn(4096, 256, generator=generator)
weight = torch.randn(100_000, 256, generator=generator) / 16
leaves = [features.requires_grad_(), weight.requires_grad_()]
for leaf in leaves:
    leaf.grad = torch.zeros_like(leaf)
target = torch.randint(100_000, (4096,), generator=generator)
projection = Projection(features, weight, None)

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
outputs = projection if sys.argv[1] == "linear_cross_entropy" else projection.logits()
total = Criterion(sys.argv[1])(outputs, target).total
total.backward()
after = status("VmHWM")
torch.save([total.detach(), *(leaf.grad for leaf in leaves)], sys.argv[2])
print(after - before)
"""


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_a_hundred_thousand_classes_in_a_quarter_of_the_memory(tmp_path):
    peaks, values = {}, {}
    for name in ("linear_cross_entropy", "cross_entropy"):
        file = tmp_path / f"{name}.pt"
        command = [sys.executable, "-c", MEASURE, name, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name], values[name] = int(done.stdout), torch.load(file)
    assert 0 < peaks["linear_cross_entropy"] <= peaks["cross_entropy"] / 4, peaks
    for found, expected in zip(*values.values(), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
