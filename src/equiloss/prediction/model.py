"""A network out of a checkpoint, with the decoder and normalisation that it was trained with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiloss.config import ModelConfig
from equiloss.config.resolved import from_stored
from equiloss.data.decoding import Decoder
from equiloss.data.normalisation import normalise, pixel_statistics, wide
from equiloss.data.sources import check_images, resize
from equiloss.errors import CheckpointError, ConfigError, DataError, RecordError, first_line
from equiloss.models.build import build_network, lay_out, parameter_dtype
from equiloss.models.dropout import RowKeys
from equiloss.records.reading import read_yaml
from equiloss.records.run_dir import BEST, CHECKPOINTS, CONFIG, LAST, TESTED
from equiloss.training.about import About
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from equiloss.training.state import RunState

BATCH = 256


@dataclass(frozen=True)
class Predictions:
    """What a network says of some images."""

    probabilities: Tensor
    """[N, K], in the order of the classes."""
    classes: tuple[str, ...]
    """Names of the K classes."""

    @property
    def indices(self) -> Tensor:
        """The most probable class of each image [N] int64; of equal ones the lower."""
        return self.probabilities.argmax(-1)

    @property
    def labels(self) -> list[str]:
        """Its name, for each image."""
        return [self.classes[index] for index in self.indices.tolist()]

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image with their probabilities, the first first."""
        values, places = self.probabilities.sort(dim=-1, descending=True, stable=True)
        rows = zip(values[:, :count].tolist(), places[:, :count].tolist(), strict=True)
        return [
            [(self.classes[place], value) for value, place in zip(*row, strict=True)]
            for row in rows
        ]


class TrainedModel:
    """The network of a checkpoint, ready for new images.

    Args:
        path: The directory of a run, whose tested weights are taken, or a checkpoint.
        target: `package.module:function` of a `model=custom`, which is code: what a checkpoint
            names is run only where the caller names it too.
        device: Where to compute.

    Raises:
        CheckpointError: if the file is missing or damaged, none of ours, or names code that
            `target` does not.
        ModelError: if the network cannot be built.
        ConfigError: for a device that is not there.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, target: str | None = None, device: str = "cpu"
    ) -> None:
        self.path = checkpoint_of(Path(path))
        loaded, _, self.about = read_checkpoint(self.path)
        self.classes = tuple(self.about.class_names)
        channels, height, width = self.about.image_shape
        self.image_shape = (channels, height, width)
        self.device = _device(device)
        named = self.about.model.get("target")
        if named != target:
            name = f"names the code {named}" if named else "names no code"
            trust = f"if you trust it, give target={named!r} (or --target {named} to a command)"
            way_out = trust if named else "give no target"
            raise CheckpointError(f"{self.path} {name}: {way_out}")
        config = ModelConfig(**self.about.model)
        with torch.random.fork_rng(devices=[]):  # which the caller may have seeded
            network = build_network(
                config,
                num_classes=len(self.classes),
                image_shape=self.image_shape,
                row_keys=RowKeys(0),
            ).to(parameter_dtype(self.about.precision))
        _load(network, loaded.get("state_dict"), self.path)
        last = self.about.channels_last
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.network = lay_out(config, network, self.memory_format).to(self.device).eval()
        mean, std = self.about.mean, self.about.std
        self.statistics = pixel_statistics(mean, std, self.device, wide(self.dtype))
        """Mean and standard deviation of pixel values in [0, 255], [C, 1, 1] each."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's parameters."""
        return parameter_dtype(self.about.precision)

    @property
    def decoder(self) -> Decoder:
        """Reads image files as training did."""
        limits = self.about.range
        value_range = None if limits is None else (limits[0], limits[1])
        return Decoder(self.image_shape[0], self.about.background, value_range)

    def read(self, file: Path, *, resizes: bool = False) -> Tensor:
        """One file as the network is given it, before normalisation [C, H, W] uint8.

        Args:
            file: An image that PIL can open.
            resizes: Whether a picture of another size is resized where training did not.

        Raises:
            DataError: naming the file, if it cannot be read or has another size.
        """
        image = self.decoder(file)
        if image.shape == self.image_shape:
            return image
        _, height, width = self.image_shape
        if self.about.image_size is None and not (resizes and height == width):
            raise DataError(
                f"image {file} has {image.shape[1]}x{image.shape[2]} pixels, and the network was "
                f"trained on {height}x{width}: resize it (--resize, where that is a square)"
            )
        return resize(image, height)

    def logits(self, images: Tensor, *, batch_size: int = BATCH) -> Tensor:
        """Scores of images, as the run's own test has them.

        Args:
            images: [N, C, H, W] uint8, of the size that the network was trained on.
            batch_size: Images at a time.

        Returns:
            [N, K] float32, or float64 for a run in double precision; on the host.

        Raises:
            DataError: for images of another type or shape.
        """
        check_images(images, "images")
        if tuple(images.shape[1:]) != self.image_shape:
            raise DataError(
                f"images are {list(images.shape[1:])} and the network was trained on "
                f"{list(self.image_shape)}"
            )
        parts = [self._logits(part) for part in torch.split(images, batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def predict(
        self,
        what: Tensor | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int = BATCH,
        resizes: bool = False,
    ) -> Predictions:
        """Probabilities of the classes, for images [N, C, H, W] uint8 or the paths of N files.

        A single path is a batch of one. Files are read as they are needed, `batch_size` at a time.

        Raises:
            DataError: for what cannot be read, naming the file.
        """
        if isinstance(what, Tensor):
            return self.predictions(self.logits(what, batch_size=batch_size))
        paths = [what] if isinstance(what, (str, os.PathLike)) else what
        logits = []
        for first in range(0, len(paths), batch_size):
            files = [Path(path) for path in paths[first : first + batch_size]]
            images = torch.stack([self.read(file, resizes=resizes) for file in files])
            logits.append(self.logits(images, batch_size=batch_size))
        if not logits:
            logits = [self.logits(torch.empty(0, *self.image_shape, dtype=torch.uint8))]
        return self.predictions(torch.cat(logits))

    def predictions(self, logits: Tensor) -> Predictions:
        """What logits [N, K] say."""
        return Predictions(logits.softmax(-1), self.classes)

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        images = normalise(images.to(self.device), *self.statistics)
        with _precision(self.about.precision, self.device):
            logits: Tensor = self.network(images.to(self.dtype, memory_format=self.memory_format))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def load(
    path: str | os.PathLike[str], *, target: str | None = None, device: str = "cpu"
) -> TrainedModel:
    """The network of a run or a checkpoint: see `TrainedModel`."""
    return TrainedModel(path, target=target, device=device)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], RunState, About]:
    """A checkpoint's content, and what it says of its run and of its network.

    Raises:
        CheckpointError: if the file is missing or damaged, or none of ours.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    state = RunState.load(loaded, path)
    return loaded, state, About.read(state.about, path)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the tested weights of a run's directory.

    Raises:
        CheckpointError: if there is none.
    """
    if not path.is_dir():
        return path
    try:
        stored = from_stored(read_yaml(path / CONFIG)) or {}
    except RecordError as error:
        raise CheckpointError(
            f"{path} is no directory of a run (its {CONFIG} {error.why}): name one, or a checkpoint"
        ) from error
    tested = TESTED.get(str(stored.get("test_weights")), BEST)
    # Where the tested weights are gone, the run itself has tested the last ones.
    for place in (path / CHECKPOINTS / name for name in (tested, LAST, BEST)):
        if place.is_file():
            return place
    raise CheckpointError(f"{path} holds no checkpoint: it has neither {BEST} nor {LAST}")


def _device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: for another one.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"device={name} cannot be had: {first_line(error)}") from error
    if device.type == "meta":
        raise ConfigError("device=meta computes no numbers: name another, such as cpu")
    return device


def _load(network: torch.nn.Module, state: Any, path: Path) -> None:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no weights by their names: it has no state_dict")
    prefix = "model."
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except (RuntimeError, AttributeError) as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path} does not fit the network that it names: {first}") from error


def _precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What Lightning puts around a forward pass in mixed precision."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in kinds:
        return nullcontext()
    return torch.autocast(device.type, dtype=kinds[precision])
