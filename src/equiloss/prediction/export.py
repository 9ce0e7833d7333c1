"""A trained network as a file that runs without this project: ONNX, or torch.export.

The file takes uint8 images [N, C, H, W] of the run's size, for any N, normalises them itself, and
gives probabilities and logits [N, K]. The names of the classes are in its metadata.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equiloss.data.normalisation import normalise
from equiloss.errors import ConfigError, UserError, first_line
from equiloss.prediction.model import TrainedModel

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
EXTRA = "pip install 'equiloss[export]'"
METADATA = "equiloss.json"

Loaded = Callable[[Tensor], Tensor]
"""An exported file as a user would call it: images [N, C, H, W] uint8 -> logits [N, K]."""


class Deployed(nn.Module):
    """Normalisation, network and softmax in one: uint8 images -> (probabilities, logits)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.network = model.network
        mean, std = model.statistics
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] uint8 -> [N, K] and [N, K]."""
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        logits = self.network(pixels)
        return logits.softmax(-1), logits


def check_export(model: TrainedModel, kind: str) -> None:
    """Refuse what cannot be exported.

    Raises:
        ConfigError: for another format, a run in lower precision than float32, or packages that
            are not installed.
    """
    if kind not in FORMATS:
        raise ConfigError(f"unknown --format {kind!r}. Known: {', '.join(FORMATS)}")
    if model.about.precision != "32-true":
        raise ConfigError(
            f"{model.path} was trained in {model.about.precision}: exports are of 32-true networks"
        )
    if kind == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--format=onnx needs {error.name}: {EXTRA}") from error


def export(model: TrainedModel, kind: str, place: Path) -> None:
    """Write a file of one of `FORMATS`.

    Raises:
        UserError: if the network cannot be traced.
    """
    deployed = Deployed(model).eval()
    example = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    said = metadata(model)
    rows = {"images": {0: torch.export.Dim("rows", min=1)}}
    try:
        with torch.no_grad(), _quietly():
            program = torch.export.export(deployed, (example,), dynamic_shapes=rows)
            if kind == "torch-export":
                torch.export.save(program, place, extra_files={METADATA: json.dumps(said)})
                return
            made: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities", "logits"],
                verbose=False,
            )
    except Exception as error:  # tracing foreign networks fails in many ways
        raise UserError(
            f"{model.path} cannot be exported as {kind}: {first_line(error)}"
        ) from error
    proto = made.model_proto
    for key, value in said.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    place.write_bytes(proto.SerializeToString())


def metadata(model: TrainedModel) -> dict[str, Any]:
    """What an exported file says of itself."""
    return {
        "class_names": list(model.classes),
        "image_shape": list(model.image_shape),
        "model": model.about.model["name"],
        "equiloss": model.about.versions["equiloss"],
    }


def classes_of(kind: str, place: Path) -> list[str]:
    """The names of the classes, in the order that the file gives them."""
    if kind == "onnx":
        import onnx

        loaded = onnx.load(place)
        return list(json.loads({p.key: p.value for p in loaded.metadata_props}["class_names"]))
    extra = {METADATA: ""}
    torch.export.load(place, extra_files=extra)
    return list(json.loads(extra[METADATA])["class_names"])


def loaded(kind: str, place: Path) -> Loaded:
    """An exported file as a user would load it: in onnxruntime, or in a process of its own."""
    return _in_onnxruntime(place) if kind == "onnx" else _in_another_process(place)


def _in_onnxruntime(place: Path) -> Loaded:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return call


PROGRAM = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    parts = torch.from_numpy(numpy.load(sys.argv[2])).split(256)
    numpy.save(sys.argv[3], torch.cat([program(part)[1] for part in parts]).numpy())
"""


def _in_another_process(place: Path) -> Loaded:
    def call(images: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory() as directory:
            given, made = Path(directory) / "images.npy", Path(directory) / "logits.npy"
            np.save(given, images.numpy())
            words = [str(path) for path in (place.absolute(), given, made)]
            command = [sys.executable, "-c", PROGRAM, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2]
                raise UserError(f"{place} cannot be loaded in another process: {last}")
            return torch.from_numpy(np.load(made))

    return call


def exactly(model: TrainedModel, images: Tensor) -> Tensor:
    """Logits [N, K] of the same weights in float64."""
    network = copy.deepcopy(model.network).double()
    mean, std = (part.double() for part in model.statistics)
    with torch.no_grad():
        parts = [network(normalise(part, mean, std)) for part in torch.split(images, 256)]
    return torch.cat(parts)


@contextmanager
def _quietly() -> Any:
    """Leave out what torch says while it traces, which nobody can act on."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    before = [each.level for each in noisy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in noisy:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(noisy, before, strict=True):
                each.setLevel(level)
