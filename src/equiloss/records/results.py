"""A run's numbers on disk: `metrics.csv`, `results.json` and `evaluation.json`.

metrics.csv holds every logged value as repr(float64), which reads back to the same bits: it is
the source of all curves and comparisons. (TensorBoard's scalars are float32.)
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equiloss.config.metrics import evaluation_metrics
from equiloss.errors import RecordError
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import build, fits, read_json
from equiloss.records.run_dir import EVALUATION, METRICS, RESULTS

if TYPE_CHECKING:
    import torch


# What is read of a formulation in `Result.parity`.
AGREEMENT = {"ratio": float | None, "agree": bool, "out_of_domain": int}
# What is read of the gradient that trained, and in words what it is that disagrees.
FOLLOWED = {
    "gradient_ratio": "the gradient at the logits",
    "sum_ratio": "the gradient's sum over ranks",
    "row_ratio": "a row that was forwarded again",
    "ranks_differ": "the ranks' weights",
}
CHECKED = {"steps": int, "agree": bool, **dict.fromkeys(FOLLOWED, float | None)}
# What is read of `Result.stopped_early`.
STOPPED = {
    "epoch": int,
    "of_epochs": int | None,
    "monitor": str,
    "validations_without_improvement": int,
    "best": float | None,
    "best_epoch": int | None,
}
TRAIN_METRICS = ("loss", "grad_norm", "lr", "samples_per_s", "skipped_steps")


def metric_names(
    formulations: Sequence[str], extra: Iterable[str] = (), *, averaged: bool = False
) -> list[str]:
    """Every name that a run logs, the same for every loss.

    Args:
        formulations: What is held against the oracle.
        extra: Names of further metrics of each split.
        averaged: Whether averaged weights are validated.

    >>> metric_names(["cross_entropy"])[-3:]
    ['parity/sum_ratio', 'parity/row_ratio', 'parity/ranks_differ']
    """
    return [
        *(f"train/{name}" for name in TRAIN_METRICS),
        *evaluation_metrics(extra, averaged=averaged),
        *(
            f"parity/{formulation}/{name}"
            for formulation in formulations
            for name in ("loss_error", "grad_error", "ratio", "nonfinite")
        ),
        "parity/max_ratio",
        "parity/global_error",
        *(f"parity/{name}" for name in FOLLOWED),
    ]


def beyond_bound(figures: Mapping[str, Any]) -> list[str]:
    """Names of `FOLLOWED` whose figure is beyond its bound; null, where it was not finite, is.

    >>> beyond_bound({"sum_ratio": 0.3, "row_ratio": None, "ranks_differ": 1.0})
    ['row_ratio', 'ranks_differ']
    """
    bounds = {**dict.fromkeys(FOLLOWED, 1), "ranks_differ": 0}
    found = {name: figures.get(name, 0.0) for name in FOLLOWED}
    return [n for n, value in found.items() if value is None or not value <= bounds[n]]


def beyond(parity: Mapping[str, Any]) -> list[str]:
    """What disagrees in `Result.parity` besides formulations, in words.

    >>> beyond({"agree": False, "sum_ratio": 7.5, "ranks_differ": 2.0})
    ["the gradient's sum over ranks", "the ranks' weights"]
    """
    if not parity or parity["agree"]:
        return []
    wrong = [FOLLOWED[name] for name in beyond_bound(parity)]
    formulations = (each for each in parity.values() if isinstance(each, dict))
    if not wrong and all(each["agree"] for each in formulations):
        return ["mass or all-reduced loss"]
    return wrong


def read_metrics(directory: Path, name: str) -> list[float]:
    """Every logged value of one metric of a run, in the order of the steps."""
    with (directory / METRICS).open(newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def read_columns(directory: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every metric of a run that was logged, in the order of the steps."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    with (directory / METRICS).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(float(value))
    return columns


@dataclass
class Result:
    """A run in numbers, as `results.json` holds it."""

    status: str
    """completed | failed | interrupted."""
    config_hash: str
    loss: dict[str, Any]
    """Name and options."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Final value of every metric, by its logged name; null where it is not finite."""
    parity: dict[str, Any] = field(default_factory=dict)
    """Worst agreement of each formulation, and the verdict."""
    samples: dict[str, int] = field(default_factory=dict)
    """Samples trained on (`train_seen`), and evaluated in `val` and `test`."""
    steps: dict[str, int] = field(default_factory=dict)
    """Optimizer steps `taken`, of which `skipped` and of which without mass (`zero_mass`)."""
    world_size: int = 1
    """Ranks of the real process group."""
    segments: list[dict[str, int]] = field(default_factory=list)
    """From which optimizer step on (`from_step`) how many ranks (`world_size`) trained: one entry,
    and another for each time that the run was continued."""
    timing: dict[str, float] = field(default_factory=dict)
    """startup_s, train_s (without evaluation), samples_per_s."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, cpu, threads, git commit."""
    network: list[dict[str, Any]] = field(default_factory=list)
    """What the network was seen to do that may depend on how the work is split: `effect`, the
    `module` that does it, and whether it is `batch_norm` alone (see `equiloss.preflight`)."""
    stopped_early: dict[str, Any] = field(default_factory=dict)
    """Where early stopping ended the run: `epoch`, `of_epochs`, `monitor`, its `best` value and
    `best_epoch` (null where an epoch has several validations)."""
    num_classes: int | None = None
    """K; null in results of versions that did not say."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the metrics must know, such as that the best weights were lost."""
    error: str | None = None
    """Message of the error that ended the run."""

    def write(self, directory: Path) -> None:
        """Replace the directory's results.json; values that are not finite become null."""
        data = asdict(self)
        for key in ("stopped_early", "notes", "error"):
            if not data[key]:
                del data[key]
        text = json.dumps(json_ready(data), indent=2, allow_nan=False)
        write_atomically(directory / RESULTS, text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Result:
        """Read a directory's results.json.

        Raises:
            RecordError: if there is none, or none as a run writes it.
        """
        file = directory / RESULTS
        tree = read_json(file)
        try:
            result = build(cls, tree)
        except ValueError as error:
            raise RecordError(file, str(error)) from error
        parity = result.parity
        rules = {
            "status": result.status in ("completed", "failed", "interrupted"),
            "loss": fits(result.loss, {"name": str}),
            "stopped_early": not result.stopped_early or fits(result.stopped_early, STOPPED),
            "parity": not parity or fits({**dict.fromkeys(FOLLOWED), **parity}, CHECKED),
            **{
                f"parity of {name}": fits({"out_of_domain": 0, **each}, AGREEMENT)
                for name, each in parity.items()
                if isinstance(each, dict)
            },
        }
        if odd := [name for name, holds in rules.items() if not holds]:
            raise RecordError(file, f"is of another form: {', '.join(odd)}")
        return result


def write_evaluations(
    directory: Path, evaluated: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]
) -> None:
    """Replace the directory's evaluation.json: the counts behind the metrics of each split.

    Per split: `confusion`, rows by (true class, predicted class) [K][K], null for more than 100
    classes; and `calibration`, with for each of 15 equal bins of confidence the number of `rows`,
    the sum of their confidences and the rows that were `right`.
    """
    data = {"class_names": list(class_names), **evaluated}
    write_atomically(directory / EVALUATION, json.dumps(data) + "\n")


def environment(device: torch.device, shards: int | None = None) -> dict[str, Any]:
    """Versions, hardware, threads and commit, which a run's numbers may depend on."""
    # Imported here: who reads results does without it, and starts seconds earlier.
    import torch

    packages = ("equiloss", "torch", "torchvision", "lightning", "torchmetrics", "hydra-core")
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        # Where the reduction is bitwise: virtual shards of a global batch.
        **({} if shards is None else {"shards": shards}),
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the working directory, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() if described.returncode == os.EX_OK else None


def json_ready(value: Any, not_finite: Callable[[float], str | None] = lambda _: None) -> Any:
    """Replace infinities and NaN, which JSON does not have: by null, or by some text."""
    if isinstance(value, dict):
        return {key: json_ready(item, not_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item, not_finite) for item in value]
    return not_finite(value) if isinstance(value, float) and not math.isfinite(value) else value
