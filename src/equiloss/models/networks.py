"""The networks written here: images [N, C, H, W] -> logits [N, K].

They use group and layer normalisation, so that no row's logits depend on the rows beside it: a
step is then the same however its batch is split. Each exposes `forward_features` and `head`, by
which a loss may ask for the head's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Stages of two 3x3 convolutions with group normalisation, then pooling over all places.

    Each stage halves height and width after its first convolution, so that the second costs a
    quarter. The head sees both the average and the maximum of each channel: on the digits the
    first generalises better, on larger images the second learns faster.

    Args:
        num_classes: K.
        in_channels: C.
        widths: Channels of each stage; divisible by `groups`.
        groups: Groups of the normalisation (Wu & He, "Group Normalization", ECCV 2018).
        dropout: Share of the pooled features that are dropped in training.
        patch: Side of the squares of pixels that become channels before the first convolution: with
            2 a quarter of the places is left, and a step takes less than a third of the time.
            Divides height and width.

    Raises:
        ValueError: for a patch below 1, or widths that `groups` does not divide.

    >>> ConvNet(num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        widths: Sequence[int] = (32, 64),
        groups: int = 8,
        dropout: float = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"patch must be 1 or more, got {patch}")
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch)] if patch > 1 else []
        channels = in_channels * patch**2
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.GroupNorm(groups, width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.GroupNorm(groups, width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.stages = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features, the head's input: [N, C, H, W] -> [N, D]."""
        maps = self.stages(images)  # [N, C, H, W] -> [N, D/2, H', W']
        features: Tensor = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        dropped: Tensor = self.dropout(features)
        return dropped

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.head(self.forward_features(images))
        return logits


class MLP(nn.Module):
    """Hidden layers with layer normalisation on the flattened image.

    Args:
        num_classes: K.
        in_features: C · H · W.
        widths: Units of each hidden layer.
        dropout: Share of each layer's units that are dropped in training.

    >>> MLP(num_classes=10, in_features=64)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        widths: Sequence[int] = (128, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        units = in_features
        for width in widths:
            layers += [nn.Linear(units, width), nn.LayerNorm(width), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(dropout)]
            units = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(units, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last hidden layer: [N, C, H, W] -> [N, D]."""
        features: Tensor = self.hidden(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [N, C, H, W] -> [N, K]."""
        logits: Tensor = self.head(self.forward_features(images))
        return logits
