"""Public sets: files of either form are found and read, or named when they cannot be."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equiloss.config import DataConfig
from equiloss.data import torchvision_sets
from equiloss.data.datasets import Splits, load
from equiloss.data.sampler import Slice
from equiloss.data.splits import SPLITS
from equiloss.errors import DataError


def rows(splits: Splits, split: str, positions: list[int] | None = None):
    source = getattr(splits, split)
    positions = list(range(len(source))) if positions is None else positions
    return source.__getitems__(Slice(0, torch.tensor(positions, dtype=torch.int64)))


def write_idx(file: Path, array: np.ndarray, *, zipped: bool = True) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim])
    header += b"".join(length.to_bytes(4, "big") for length in array.shape)
    content = header + array.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
    else:
        file.write_bytes(content)


def write_mnist(root: Path, *, zipped: bool = True) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 100), ("t10k", 30)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte", images, zipped=zipped)
        write_idx(root / f"{part}-labels-idx1-ubyte", labels, zipped=zipped)
        arrays[part] = images
    return arrays


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_found_and_read(tmp_path, place, zipped):
    arrays = write_mnist(tmp_path / place, zipped=zipped)
    splits = load(DataConfig(name="mnist", root=str(tmp_path)))
    assert [len(getattr(splits, split)) for split in SPLITS] == [90, 10, 30]
    assert splits.image_shape == (1, 28, 28)
    test = rows(splits, "test")
    assert np.array_equal(test.images.squeeze(1).numpy(), arrays["t10k"])
    assert test.target.tolist() == [n % 10 for n in range(30)]


def test_damaged_and_missing_idx_files_are_named(tmp_path):
    write_mnist(tmp_path)
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    config = DataConfig(name="mnist", root=str(tmp_path))
    for broken in (whole[:-40], gzip.compress(gzip.decompress(whole)[:-1]), b"no gzip"):
        images.write_bytes(broken)
        with pytest.raises(DataError, match=re.escape(str(images))):
            load(config)
    images.unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is missing"):
        load(config)


def test_missing_sets_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", tmp_path / "fashion-mnist")
    with pytest.raises(DataError) as raised:
        load(DataConfig(name="fashion_mnist"))
    message = str(raised.value)
    expected = ("FashionMNIST/raw", "data.root=", "data.download=true", "dataset-fashion-mnist")
    assert all(part in message for part in expected)
    assert "\n" not in message
    for name in ("mnist", "cifar10", "cifar100"):
        with pytest.raises(DataError, match=rf"{name}.*data\.root=.*data\.download=true") as raised:
            load(DataConfig(name=name, root=str(tmp_path)))
        assert "Debian" not in str(raised.value)


def test_cifar_images_become_channels_first(tmp_path, monkeypatch):
    from torchvision import datasets

    def fake(root, *, train, download):
        assert (Path(root), download) == (tmp_path, True)
        n = 40 if train else 20
        data = np.arange(n * 32 * 32 * 3, dtype=np.int64) % 251
        data = data.astype(np.uint8).reshape(n, 32, 32, 3)
        labels = [i % 4 for i in range(n)]
        return SimpleNamespace(data=data, targets=labels, classes=["a", "b", "c", "d"])

    monkeypatch.setattr(datasets, "CIFAR10", fake)
    splits = load(DataConfig(name="cifar10", root=str(tmp_path), download=True))
    assert splits.class_names == ("a", "b", "c", "d")
    test = rows(splits, "test")
    assert torch.equal(
        test.images,
        torch.from_numpy(fake(tmp_path, train=False, download=True).data.transpose(0, 3, 1, 2)),
    )
    assert len(splits.mean) == 3


@pytest.mark.real_data
@pytest.mark.skipif(
    not torchvision_sets.DEBIAN_FASHION_MNIST.is_dir(),
    reason="the real Fashion-MNIST is not installed: apt install dataset-fashion-mnist",
)
def test_real_fashion_mnist_is_whole():
    root = str(torchvision_sets.DEBIAN_FASHION_MNIST)
    splits = load(DataConfig(name="fashion_mnist", root=root))
    assert [len(getattr(splits, split)) for split in SPLITS] == [54_000, 6_000, 10_000]
    assert splits.class_counts.tolist() == [5400] * 10
    assert torch.bincount(splits.test.targets).tolist() == [1000] * 10
    # The mean and deviation of the 60,000 that are commonly given are 0.2860 and 0.3530.
    assert splits.mean[0] == pytest.approx(0.2860, abs=1e-3)
    assert splits.std[0] == pytest.approx(0.3530, abs=1e-3)
    assert splits.class_names[splits.test.targets[0]] == "Ankle boot"
