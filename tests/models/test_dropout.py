"""Dropout by sample: torch's distribution, and the same mask for a sample in any company."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equiloss.models.dropout import KeyedDropout, KeyedStochasticDepth, RowKeys, key_dropout

each_p = pytest.mark.parametrize("p", [0.1, 0.5, 0.9])


def masks(p: float, index: torch.Tensor, *, epoch: int = 0, seed: int = 0, layer: int = 0):
    """What becomes of ones [n, 1000]."""
    row_keys = RowKeys(seed)
    with row_keys.bound_to(index, epoch):
        return KeyedDropout(p, row_keys, layer)(torch.ones(len(index), 1000, dtype=torch.float64))


@each_p
def test_values_are_dropped_with_probability_p_and_scaled(p: float) -> None:
    found = masks(p, torch.arange(1000))
    assert found.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    dropped = (found == 0).double().mean().item()
    # A million draws: five standard deviations of their mean.
    assert abs(dropped - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    # Neither rows nor columns are alike: a thousand draws each.
    for axis in (0, 1):
        shares = (found == 0).double().mean(axis)
        assert abs(shares - p).max() < 6 * (p * (1 - p) / 1e3) ** 0.5


def test_a_sample_has_its_mask_in_any_batch() -> None:
    together = masks(0.5, torch.tensor([4, 9, 2]))
    assert torch.equal(masks(0.5, torch.tensor([2, 4])), together[[2, 0]])


def test_seed_epoch_sample_and_layer_make_another_mask() -> None:
    index = torch.tensor([3])
    mask = masks(0.5, index)
    for other in (
        masks(0.5, index, seed=1),
        masks(0.5, index, epoch=1),
        masks(0.5, index, layer=1),
        masks(0.5, index + 1),
    ):
        # Independent halves agree on half of the values, give or take five deviations.
        assert abs((mask == other).double().mean() - 0.5) < 5 * 0.5 / 1000**0.5


def test_a_network_may_have_any_number_of_layers() -> None:
    index = torch.arange(4)
    found = [masks(0.5, index, layer=layer) for layer in (0, 1, 2, 3, 200, 10**9)]
    assert len({tuple(mask.flatten().tolist()) for mask in found}) == len(found)


def test_the_gradient_goes_through_what_was_kept() -> None:
    row_keys = RowKeys(0)
    features = torch.ones(2, 3, 4, requires_grad=True)
    with row_keys.bound_to(torch.tensor([0, 1]), 0):
        dropped = KeyedDropout(0.5, row_keys, 0)(features)
    dropped.sum().backward()
    assert torch.equal(features.grad, dropped.detach())


def test_a_slice_without_rows_passes() -> None:
    assert masks(0.5, torch.empty(0, dtype=torch.int64)).shape == (0, 1000)


def test_everything_and_nothing() -> None:
    assert masks(1.0, torch.arange(2)).sum() == 0
    assert masks(0.0, torch.arange(2)).sum() == 2000


def test_outside_of_a_step_it_is_torchs_own() -> None:
    layer = KeyedDropout(0.5, RowKeys(0), 0)
    torch.manual_seed(0)
    found = layer(torch.ones(4, 4))
    torch.manual_seed(0)
    assert torch.equal(found, nn.Dropout(0.5)(torch.ones(4, 4)))
    assert torch.equal(layer.eval()(torch.ones(4)), torch.ones(4))


def test_another_first_axis_is_refused() -> None:
    row_keys = RowKeys(0)
    with (
        row_keys.bound_to(torch.arange(2), 0),
        pytest.raises(RuntimeError, match=r"dropout on \[3, 5\] in a forward pass of 2 rows"),
    ):
        KeyedDropout(0.5, row_keys, 0)(torch.ones(3, 5))


def test_layers_of_a_network_are_replaced_and_differ() -> None:
    row_keys = RowKeys(0)
    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.3)))
    key_dropout(model, row_keys)
    layers = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert [(layer.p, layer.layer) for layer in layers] == [(0.2, 0), (0.3, 1)]


class TestStochasticDepth:
    def test_what_drops_nothing_hands_on_what_it_is_given(self) -> None:
        branch = torch.ones(2, 3)
        assert KeyedStochasticDepth(0.5, RowKeys(0), 0).eval()(branch) is branch
        assert KeyedStochasticDepth(0.0, RowKeys(0), 0)(branch) is branch

    def branches(self, p: float, index: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """What becomes of ones [n, 2, 3]."""
        row_keys = RowKeys(0)
        with row_keys.bound_to(index, epoch=0):
            return KeyedStochasticDepth(p, row_keys, layer)(torch.ones(len(index), 2, 3))

    @each_p
    def test_whole_rows_are_dropped_with_probability_p_and_scaled(self, p: float) -> None:
        found = self.branches(p, torch.arange(10_000))
        assert found.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert torch.equal(found, found[:, :1, :1].expand_as(found))
        # Ten thousand draws: five standard deviations of their mean.
        assert abs((found[:, 0, 0] == 0).double().mean() - p) < 5 * (p * (1 - p) / 1e4) ** 0.5

    def test_a_sample_has_its_own_in_any_batch_and_layer(self) -> None:
        together = self.branches(0.5, torch.arange(64))
        assert torch.equal(self.branches(0.5, torch.tensor([9, 3])), together[[9, 3]])
        assert not torch.equal(self.branches(0.5, torch.arange(64), layer=1), together)

    def test_outside_of_a_step_rows_are_drawn(self) -> None:
        layer = KeyedStochasticDepth(0.5, RowKeys(0), 0)
        torch.manual_seed(0)
        found = layer(torch.ones(64, 4))
        assert torch.equal(found, found[:, :1].expand_as(found))
        assert found.unique().tolist() == [0, 2]
        assert not torch.equal(layer(torch.ones(64, 4)), found)
        assert torch.equal(layer.eval()(torch.ones(64, 4)), torch.ones(64, 4))

    def test_where_the_first_axis_is_not_the_rows_it_draws_from_the_generator(self) -> None:
        row_keys = RowKeys(0)
        before = torch.random.get_rng_state()
        with row_keys.bound_to(torch.arange(2), 0):
            found = KeyedStochasticDepth(0.5, row_keys, 0)(torch.ones(64, 5))
        assert found.unique().tolist() == [0, 2]
        assert not torch.equal(torch.random.get_rng_state(), before)

    def test_layers_of_torchvision_and_timm_are_replaced_after_those_of_dropout(self) -> None:
        from timm.layers import DropPath
        from torchvision.ops import StochasticDepth

        of_batch, unscaled = StochasticDepth(0.1, "batch"), DropPath(0.1, scale_by_keep=False)
        layers = [StochasticDepth(0.3, "row"), nn.Dropout(0.2), DropPath(0.4), of_batch, unscaled]
        model = nn.Sequential(*layers)
        key_dropout(model, RowKeys(0))
        assert [(type(m), m.p, m.layer) for m in model[:3]] == [
            (KeyedStochasticDepth, 0.3, 1),
            (KeyedDropout, 0.2, 0),
            (KeyedStochasticDepth, 0.4, 2),
        ]
        assert [*model[3:]] == [of_batch, unscaled]
