"""A network of one's own: images [N, C, H, W] to logits [N, K]."""

from torch import Tensor, nn


class Small(nn.Module):
    """Two layers of convolution and a head; no row knows the others."""

    def __init__(self, num_classes: int, in_channels: int, *, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.head(self.layers(images))
