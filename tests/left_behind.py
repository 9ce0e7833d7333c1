"""Run directories as runs would leave them, for the tests of the report."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from equiloss.records.results import Result
from equiloss.records.run_dir import EVALUATION, METRICS

# Options that not every loss has.
OWN: dict[str, dict[str, Any]] = {"cross_entropy": {"z_loss": 0.0}, "focal": {"gamma": 2.0}}
LOSSES = ("softmax_nll", "log_softmax_nll", "cross_entropy")


def formulation(ratio: float = 0.1, *, agree: bool = True) -> dict[str, Any]:
    return {"loss_error": 1e-8, "grad_error": 1e-8, "ratio": ratio, "nonfinite": 0, "agree": agree}


def write_run(
    directory: Path,
    loss: str = "cross_entropy",
    seed: int = 0,
    *,
    precision: str = "32-true",
    devices: int = 1,
    status: str = "completed",
    shift: float = 0.0,
    parity: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    steps: int = 20,
    first: int = 0,
    replaced: Mapping[int, float] | None = None,
    error: str = "rank 1 was killed by SIGKILL",
    **config: Any,
) -> Path:
    """A run directory as a run would leave it.

    Its training loss is off by a factor 1 + shift, logged from step `first` on, and some of its
    values are replaced.
    """
    directory.mkdir(parents=True)
    drawn = random.Random(seed)
    losses = [drawn.uniform(0.9, 1.1) / (step + 1) * (1 + shift) for step in range(steps)]
    for step, value in (replaced or {}).items():
        losses[step] = value
    settings = {
        "loss": {"name": loss, "label_smoothing": 0.0} | (options or OWN.get(loss, {})),
        "trainer": {"precision": precision, "devices": devices},
        "parity": {"formulations": list(LOSSES)},
        "seed": seed,
        "progress_bar": bool(seed % 2),  # never counts
        **config,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    with (directory / METRICS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss", "val/nll", "parity/cross_entropy/ratio"])
        for step, value in enumerate(losses, first):
            writer.writerow([step, repr(value), repr(value) if step % 10 == 9 else "", 0.1])
    if parity is None and status == "completed":
        parity = {name: formulation() for name in LOSSES} | {"steps": 2, "agree": True}
    result = Result(status, "0" * 64, {"name": loss, "options": {}}, world_size=devices)
    result.parity = parity or {}
    if status == "completed":
        test_loss = losses[-1]
        result.metrics = {"test/loss": test_loss, "test/acc": 0.9 + seed / 100, "val/nll": 0.5}
        result.timing = {"train_s": 2.0 + seed, "samples_per_s": 1000.0}
        result.environment = {"versions": {"torch": "2.14.1"}, "threads": 1}
    else:
        result.error = error
    result.write(directory)
    return directory


def three_losses(directory: Path, **options: Any) -> None:
    for loss in LOSSES:
        for seed in (0, 1):
            write_run(directory / f"{loss}-s{seed}", loss, seed, **options)


def edit(run: Path, **fields: Any) -> None:
    """Replace fields of a run's results."""
    result = Result.read(run)
    for name, value in fields.items():
        setattr(result, name, value)
    result.write(run)


def write_multirun(directory: Path, *task: str, **params: str) -> None:
    """What Hydra notes of a sweep."""
    directory.mkdir(parents=True, exist_ok=True)
    hydra = {"overrides": {"task": list(task)}, "sweeper": {"params": params}}
    (directory / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))


def write_evaluation(run: Path, classes: int = 3, split: str = "test") -> None:
    """Confusion matrix and calibration of one split: everything right."""
    confusion = [[10 * (row == column) for column in range(classes)] for row in range(classes)]
    bins = {"rows": [0.0, 10.0], "confidence": [0.0, 9.0], "right": [0.0, 10.0]}
    evaluation = {"confusion": confusion, "calibration": bins}
    names = [str(number) for number in range(classes)]
    (run / EVALUATION).write_text(json.dumps({"class_names": names, split: evaluation}))
