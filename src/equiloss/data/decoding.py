"""From an image file to [C, H, W] uint8: the one decoder, for training and for whatever predicts.

PIL's own `convert` clips what does not fit into 8 bits and forgets orientation and transparency:
16-bit pictures become white, photos stand on their heads, and shapes that only the transparency
holds become equal. Here each of these is read for what it shows, or refused by name.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiloss.errors import DataError

# PIL's name of a mode, with the largest value that it may hold; I and F have no such value.
DEEP_MODES: dict[str, float | None] = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), 65535.0),
    **dict.fromkeys(("I", "F"), None),
}
# A set whose brightest value is below this part of its range is probably of fewer bits.
DARK = 1 / 8


@dataclass(frozen=True)
class Decoder:
    """How files become pixels.

    Args:
        channels: 1 for grey, 3 for RGB.
        background: What transparent pictures are composed on: a colour by name or as #rrggbb.
        value_range: Values of black and white in files of more than 8 bits (None: 0 and 65535 in
            16 bits; 32-bit integers and floating point are refused).

    >>> Decoder(channels=1).background
    'white'
    """

    channels: int
    background: str = "white"
    value_range: tuple[float, float] | None = None

    def __call__(self, file: Path) -> Tensor:
        """Read one image file as [C, H, W] uint8; of several frames, the first.

        Raises:
            DataError: naming the file, if PIL cannot read it, if its values have no known range,
                or if it shows nothing on this background though it is not transparent alike.
        """
        Image, ImageOps = pil()  # noqa: N806 - the names that they have everywhere
        try:
            with Image.open(file) as image:
                deep = image.mode in DEEP_MODES
                image = ImageOps.exif_transpose(image)
                if not deep:
                    image = self._composed(file, image)
                    image = image.convert("L" if self.channels == 1 else "RGB")
                pixels = np.array(image)
        except (Image.DecompressionBombError, MemoryError) as error:
            raise too_large(file, error) from error
        # PIL reports broken files through whatever its decoders raise, SyntaxError included.
        except (OSError, ValueError, SyntaxError) as error:
            # PIL's own words for what it does not know name the file once more.
            unknown = isinstance(error, Image.UnidentifiedImageError)
            why = "no known image format" if unknown else error
            raise DataError(f"cannot read image {file}: {why}; mend or remove it") from error
        if deep:
            grey = torch.from_numpy(self._eight_bits(file, image.mode, pixels))  # [H, W]
            return grey.expand(self.channels, -1, -1).contiguous()
        # [H, W] or [H, W, C] -> [C, H, W]
        shape = (*pixels.shape[:2], self.channels)
        return torch.from_numpy(pixels).reshape(shape).permute(2, 0, 1)

    def _composed(self, file: Path, image: Any) -> Any:
        """The picture on the background, where parts of it are transparent."""
        if not image.has_transparency_data:
            return image
        Image, _ = pil()  # noqa: N806
        layers = image.convert("RGBA")
        composed = Image.new("RGBA", layers.size, self.background)
        composed.alpha_composite(layers)
        composed = composed.convert("RGB")
        low, high = layers.getchannel("A").getextrema()
        if low < high and all(least == most for least, most in composed.getextrema()):
            raise DataError(
                f"image {file} is of one colour on {self.background}, and its shape is lost: set "
                "data.background= to another colour, such as black"
            )
        return composed

    def _eight_bits(self, file: Path, mode: str, pixels: Any) -> Any:
        """Values [H, W] of more bits, by their range, as uint8."""
        low, high = self.value_range or (0.0, DEEP_MODES[mode])
        if high is None:
            raise without_range(file, mode)
        shares = (pixels.astype(np.float64) - low) / (high - low)
        if not np.isfinite(shares).all():
            raise DataError(f"image {file} holds values that are no numbers (NaN or infinite)")
        return (shares.clip(0, 1) * 255).round().astype(np.uint8)


def too_large(file: Path, error: Exception) -> DataError:
    """The error of an image that PIL refuses for its size, or that memory has no room for."""
    why = str(error).partition(", could be")[0] or "it is larger than the memory"
    return DataError(f"cannot read image {file}: {why}; make it smaller, or remove it")


def without_range(file: Path, mode: str) -> DataError:
    """The error of an image whose values have no largest one."""
    kind = "floating point" if mode == "F" else "32-bit integers"
    return DataError(
        f"image {file} holds {kind}, and what is white is not known: set "
        "data.range=[BLACK,WHITE], such as data.range=[0,1]"
    )


def brightest(file: Path) -> float | None:
    """The largest value of a file of more than 8 bits, over the largest that it may hold.

    None where that is not known, or the file cannot be decoded, as its decoder will say.
    """
    Image, _ = pil()  # noqa: N806
    broken = (Image.DecompressionBombError, OSError, ValueError, SyntaxError, MemoryError)
    with suppress(*broken), Image.open(file) as image:
        if largest := DEEP_MODES.get(image.mode):
            return float(np.array(image).max()) / largest
    return None


@cache
def pil() -> Any:
    """PIL, which warns of images half as large as it refuses: they are read like others."""
    from PIL import Image, ImageOps

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, ImageOps
