"""From pixels to what a network is given: the one place, for training and for whatever predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pixel_statistics(
    mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel values in [0, 255], [C, 1, 1] each.

    Args:
        mean: Per channel, of values in [0, 1].
        std: Likewise.
        device: Of the images.
        dtype: In which they are normalised.
    """
    low, spread = (
        255 * torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)
        for values in (mean, std)
    )
    return low, spread


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what images are normalised: half precision cannot tell all 256 values apart after it.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Uint8 images [N, C, H, W] less the mean, over the standard deviation, in their dtype.

    >>> pixels = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    >>> statistics = pixel_statistics([0.5], [0.5], torch.device("cpu"), torch.float32)
    >>> normalise(pixels, *statistics).flatten().tolist()
    [-1.0, 1.0]
    """
    return images.to(mean.dtype).sub_(mean).div_(std)
