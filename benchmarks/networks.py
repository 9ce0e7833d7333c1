"""The networks of the loops."""

from __future__ import annotations

from torch import nn


def mlp(num_classes: int, in_channels: int) -> nn.Module:
    """784-64-128-64-10 with batch normalisation, as small classifiers of papers are."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = in_channels * 28 * 28
    for width in (64, 128, 64):
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
