"""One decoder: what a file shows is what a network sees, or the file is refused by name."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from equiloss.config import DataConfig
from equiloss.data import decoding
from equiloss.data.datasets import load
from equiloss.data.decoding import Decoder
from equiloss.errors import ConfigError, DataError

GREY, RGB = Decoder(1), Decoder(3)


def saved(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def ramp(top: float, kind: type, height: int = 3, width: int = 5) -> np.ndarray:
    return np.linspace(0, top, height * width).reshape(height, width).astype(kind)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, ending):
    pixels = ramp(65535, np.uint16)
    expected = torch.from_numpy((pixels / 65535 * 255).round().astype(np.uint8))
    file = saved(tmp_path / f"deep.{ending}", pixels)
    assert torch.equal(GREY(file), expected[None])
    assert torch.equal(RGB(file), expected.expand(3, -1, -1))
    # 12 bits in a file of 16.
    narrow = saved(tmp_path / f"narrow.{ending}", ramp(4095, np.uint16))
    assert torch.equal(Decoder(1, value_range=(0, 4095))(narrow), GREY(file))
    assert torch.equal(Decoder(1, value_range=(4095, 0))(narrow), 255 - GREY(file))


@pytest.mark.parametrize(("kind", "top"), [(np.int32, 100_000), (np.float32, 1.0)])
def test_values_of_no_known_range_are_refused_without_one(tmp_path, kind, top):
    file = saved(tmp_path / "values.tiff", ramp(top, kind))
    with pytest.raises(DataError, match=rf"image {file} holds .*set data\.range=\[BLACK,WHITE\]"):
        GREY(file)
    got = Decoder(1, value_range=(0, top))(file)
    assert got.flatten()[[0, 7, 14]].tolist() == [0, 128, 255]
    # Beyond the range is black or white, and nothing wraps around.
    assert Decoder(1, value_range=(0, top / 2))(file).flatten()[7:].tolist() == [255] * 8


def test_values_that_are_no_numbers_are_refused(tmp_path):
    file = saved(tmp_path / "nan.tiff", np.array([[0, np.nan]], dtype=np.float32))
    with pytest.raises(DataError, match=r"no numbers \(NaN or infinite\)"):
        Decoder(1, value_range=(0, 1))(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    upright = ramp(250, np.uint8)
    # What a camera stores, so that its viewer shows the upright picture.
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as stored:
        assert np.array_equal(np.array(ImageOps.exif_transpose(stored)), upright)
    assert torch.equal(GREY(tmp_path / "photo.png"), torch.from_numpy(upright)[None])


@pytest.mark.parametrize(
    ("mode", "background"), [*product(["RGBA", "LA", "P"], ["white", "#000000"])]
)
def test_transparent_parts_show_the_background(tmp_path, mode, background):
    shape = np.zeros((2, 4, 4), dtype=np.uint8)
    shape[..., 0] = shape[..., 1] = shape[..., 2] = 90
    shape[:, :2, 3] = 255
    image = Image.fromarray(shape)
    image = image.convert(mode) if mode != "P" else image.quantize(4)
    image.save(tmp_path / "shape.png")
    with Image.open(tmp_path / "shape.png") as stored:
        assert stored.mode == mode
    behind = 255 if background == "white" else 0
    for decoder in (Decoder(1, background), Decoder(3, background)):
        got = decoder(tmp_path / "shape.png")
        assert got[:, :, :2].unique().tolist() == [90]
        assert got[:, :, 2:].unique().tolist() == [behind]


def test_a_shape_that_vanishes_on_the_background_is_refused(tmp_path):
    shape = np.full((2, 2, 4), 255, dtype=np.uint8)
    shape[0, :, 3] = 0
    file = saved(tmp_path / "white.png", shape)
    with pytest.raises(DataError, match=rf"image {file} is of one colour on white, .* black"):
        RGB(file)
    assert Decoder(3, "black")(file).unique().tolist() == [0, 255]


def test_what_pil_reduces_keeps_its_upper_8_bits(tmp_path):
    # 16 bits for each of three channels, which PIL cannot hold.
    header = b"P6 2 1 65535\n"
    values = np.array([[0, 65535, 256], [513, 32768, 255]], dtype=">u2")
    (tmp_path / "deep.ppm").write_bytes(header + values.tobytes())
    got = RGB(tmp_path / "deep.ppm")[:, 0].T.tolist()
    assert np.abs(np.array(got) - values.astype(float) / 257).max() <= 1


def test_dark_sets_of_16_bits_are_pointed_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            saved(tmp_path / name / f"{number}.png", ramp(4095, np.uint16))
    config = {"name": "image_folder", "root": str(tmp_path), "options": {"channels": 1}}
    (note,) = load(DataConfig(**config)).notes
    assert note.startswith("8 images of 16 bits: 65535 is white")
    assert "the brightest value of 8 of them is 4095" in note
    splits = load(DataConfig(**config, range=[0, 4095]))
    assert splits.notes == ("8 images of more than 8 bits: 0 is black and 4095 white",)
    saved(tmp_path / "a" / "0.png", ramp(65535, np.uint16))
    (note,) = load(DataConfig(**config)).notes
    assert "brightest" not in note
    cut = tmp_path / "b" / "3.png"
    cut.write_bytes(cut.read_bytes()[:60])
    assert decoding.brightest(cut) is None  # its decoder will name it


def test_values_without_a_range_are_refused_before_the_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            saved(tmp_path / name / f"{number}.tiff", ramp(255, np.uint8))
    odd = saved(tmp_path / "b" / "2.tiff", ramp(1, np.float32))
    config = {"name": "image_folder", "root": str(tmp_path)}
    with pytest.raises(DataError, match=rf"{odd} holds floating point, .* set data\.range="):
        load(DataConfig(**config))
    load(DataConfig(**config, range=[0, 1]))


def test_settings_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.range is \[BLACK,WHITE\]"):
        DataConfig(name="digits", range=[1.0])
    with pytest.raises(ConfigError, match=r"data\.background=grÜn is no colour"):
        load(DataConfig(name="image_folder", root=str(tmp_path), background="grÜn"))


def test_an_image_too_large_to_be_decoded_is_named_in_one_line(tmp_path, monkeypatch):
    decoding.pil.cache_clear()
    image = saved(tmp_path / "large.png", np.zeros((6, 4, 3), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(DataError) as caught:
        RGB(image)
    assert str(caught.value) == (
        f"cannot read image {image}: Image size (24 pixels) exceeds limit of 22 pixels; "
        "make it smaller, or remove it"
    )
    # PIL's warning of half as many is no error, and is not shown.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    assert RGB(image).shape == (3, 6, 4)
