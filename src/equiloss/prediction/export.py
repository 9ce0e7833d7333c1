"""A trained network as a file that runs without this project: ONNX, or torch.export.

The file takes uint8 images [N, C, H, W] of the run's size, for any N, normalises them itself, and
gives probabilities and logits [N, K]. The names of the classes are in its metadata.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equiloss.data.normalisation import normalise
from equiloss.errors import ConfigError, UserError, choose, first_line
from equiloss.prediction.model import BATCH, TrainedModel

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
EXTRA = "pip install 'equiloss[export]'"
METADATA = "equiloss.json"

Loaded = Callable[[Tensor], tuple[Tensor, Tensor]]
"""An exported file as a user would call it: images [N, C, H, W] uint8 -> probabilities and logits,
[N, K] each."""


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
        logits = self.network(normalise(images, self.mean, self.std))
        return logits.softmax(-1), logits


def check_format(kind: str) -> None:
    """Refuse a format that cannot be written here, which needs no network.

    Raises:
        ConfigError: for another format, or packages that are not installed.
    """
    choose("--format", kind, FORMATS)
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
        ConfigError: for a run in another precision than float32.
        UserError: if the network cannot be traced, or is larger than the format can hold.
        OSError: if the file cannot be written.
    """
    if model.about.precision != "32-true":
        raise ConfigError(
            f"{model.path} was trained in {model.about.precision}: exports are of 32-true networks"
        )
    deployed = Deployed(model).eval()
    example = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    rows = {"images": {0: torch.export.Dim("rows", min=1)}}
    serialised = _as_onnx if kind == "onnx" else _as_torch_export
    try:
        with torch.no_grad(), _quietly():
            program = torch.export.export(deployed, (example,), dynamic_shapes=rows)
            content = serialised(program, metadata(model))
    except Exception as error:  # tracing foreign networks fails in many ways
        raise UserError(
            f"{model.path} cannot be exported as {kind}: {first_line(error)}"
        ) from error
    place.write_bytes(content)


def _as_onnx(program: torch.export.ExportedProgram, said: dict[str, Any]) -> bytes:
    made: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities", "logits"],
        verbose=False,
    )
    proto = made.model_proto
    for key, value in said.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    content: bytes = proto.SerializeToString()
    return content


def _as_torch_export(program: torch.export.ExportedProgram, said: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: json.dumps(said)})
    return content.getvalue()


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


@contextmanager
def calling(place: Path, name: Path) -> Iterator[None]:
    """Say that an exported file cannot be loaded and called, by a user's name of it.

    Raises:
        UserError: for whatever was raised inside; those who read a file raise many types.
    """
    try:
        yield
    except Exception as error:
        why = first_line(error).replace(str(place.absolute()), str(name))
        raise UserError(f"{name} cannot be loaded and called: {why}") from error


def _in_onnxruntime(place: Path) -> Loaded:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(place.absolute()), providers=providers)
    outputs = ["probabilities", "logits"]

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [session.run(outputs, {"images": p.numpy()}) for p in torch.split(images, BATCH)]
        probabilities, logits = (np.concatenate(each) for each in zip(*parts, strict=True))
        return torch.from_numpy(probabilities), torch.from_numpy(logits)

    return call


PROGRAM = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    parts = torch.from_numpy(numpy.load(sys.argv[2])).split(int(sys.argv[4]))
    made = zip(*(program(part) for part in parts))
    numpy.save(sys.argv[3], torch.stack([torch.cat(each) for each in made]).numpy())
"""


def _in_another_process(place: Path) -> Loaded:
    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        with tempfile.TemporaryDirectory() as directory:
            given, made = Path(directory) / "images.npy", Path(directory) / "made.npy"
            np.save(given, images.numpy())
            words = [str(word) for word in (place.absolute(), given, made, BATCH)]
            command = [sys.executable, "-c", PROGRAM, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2]
                why = re.sub(r"^[\w.]+(: |$)", "", last)  # the type of its exception
                raise UserError(why or f"its process ended with code {done.returncode}")
            probabilities, logits = torch.from_numpy(np.load(made))
            return probabilities, logits

    return call


def exactly(model: TrainedModel, images: Tensor) -> Tensor:
    """Logits [N, K] of the same weights in float64.

    Raises:
        UserError: for a network that computes in another type whatever it is given.
    """
    network = copy.deepcopy(model.network).double()
    mean, std = (part.double() for part in model.statistics)
    try:
        with torch.no_grad():
            parts = [network(normalise(part, mean, std)) for part in torch.split(images, BATCH)]
    except Exception as error:  # foreign networks fail in many ways
        raise UserError(
            f"{model.path} cannot be computed in float64, to which its certificate refers: "
            f"{first_line(error)}"
        ) from error
    return torch.cat(parts)


@contextmanager
def _quietly() -> Iterator[None]:
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
