"""Training steps on Fashion-MNIST against a bare loop in PyTorch, one thread each."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from benchmarks import baselines, networks
from benchmarks.baselines import Stopwatch
from benchmarks.paired import Arrangement, Measure
from equiloss.config import resolved
from equiloss.data import datasets
from equiloss.data.sources import ArraySource
from equiloss.losses import config_source
from equiloss.models.networks import ConvNet
from equiloss.run import run

CONF = Path(__file__).parents[1] / "conf"
FIRST = 20
"""Steps that do not count: the first check of parity and what is loaded for it among them."""
# All within the first epoch: a validation is other work.
STEPS = {"mlp": 400, "convnet": 20}
OPTIONS = {
    "mlp": [
        *("model=custom", "model.target=benchmarks.networks:mlp"),
        *(
            "optimizer=adamw",
            "optimizer.name=Adam",
            "optimizer.lr=0.001",
            "optimizer.weight_decay=0",
        ),
        *("data.augment.shift=0", "data.augment.flip=false"),
    ],
    "convnet": [],
}
"""What makes the same work of a run; the bare loops have it written out."""


def network_of(work: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network of a piece of work, and what trains it."""
    if work == "mlp":
        network = networks.mlp(10, 1)
        return network, torch.optim.Adam(network.parameters(), lr=0.001)
    network = ConvNet(10, 1)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    return network, optimizer


def composed(*overrides: str) -> resolved.ResolvedConfig:
    """The configuration that train.py would have."""
    resolved.register_schema()
    config_source.install()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolved.resolve(compose("config", overrides=list(overrides)))


def fashion_mnist() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] uint8 and targets [N] of the training set."""
    splits = datasets.load(composed("data=fashion_mnist").config.data)
    assert isinstance(splits.train, ArraySource)
    return splits.train.images, splits.train.targets


def bare(work: str, *, channels_last: bool = False) -> Measure:
    """Seconds per step of a loop that does nothing but train."""
    torch.set_num_threads(1)
    network, optimizer = network_of(work)
    steps = baselines.bare_loop(
        network, optimizer, *fashion_mnist(), augment=work == "convnet", channels_last=channels_last
    )
    for _ in range(FIRST):
        next(steps)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS[work]):
            next(steps)
        return (time.perf_counter() - began) / STEPS[work]

    return measure


def lightning(work: str, style: str) -> Measure:
    """Seconds per step of Lightning's Trainer with a module in a style: empty or common."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    images, targets = fashion_mnist()
    count = STEPS[work] if style == "empty" else STEPS[work] // 4

    def measure() -> float:
        stopwatch = Stopwatch(FIRST, count)
        with tempfile.TemporaryDirectory() as directory:
            if style == "empty":
                module: Any = baselines.EmptyModule(*network_of(work))
                loader: Any = baselines.InMemory(images, targets)
                options: dict[str, Any] = {}
            else:
                module = baselines.CommonStyle(*network_of(work))
                loader = baselines.common_loader(images, targets)
                loggers = [CSVLogger(directory), TensorBoardLogger(directory)]
                options = {"logger": loggers, "log_every_n_steps": 1, "enable_progress_bar": True}
            baselines.trainer(stopwatch, FIRST + count, **options).fit(module, loader)
        return stopwatch.seconds / count

    return measure


def equiloss(work: str, overrides: list[str]) -> Measure:
    """Seconds per step of a run of ours."""
    data = ("data=fashion_mnist", f"data.batch_size={baselines.BATCH}")
    return lambda: seconds_per_step(FIRST, STEPS[work], *data, *OPTIONS[work], *overrides)


def seconds_per_step(first: int, count: int, *overrides: str) -> float:
    """Time the training steps of a run.

    Args:
        first: Steps that do not count.
        count: Steps after them that do.
        overrides: Its configuration, as the command line has it.
    """
    watch = "callbacks.items.stopwatch"
    with tempfile.TemporaryDirectory() as directory:
        config = composed(
            *("trainer.threads=1", f"trainer.max_steps={first + count}", "callbacks=quiet"),
            *(f"+{watch}.target=benchmarks.baselines:Stopwatch",),
            *(f"+{watch}.first={first}", f"+{watch}.steps={count}"),
            *overrides,
        )
        run(config, Path(directory) / "run")
    return Stopwatch.last.seconds / count


def arrangements(work: str) -> list[Arrangement]:
    """Each way to train a network, the bare loop first."""

    def way(name: str, function: str, wanted: float | None = None, **options: Any) -> Arrangement:
        return Arrangement(name, f"benchmarks.loop:{function}", {"work": work, **options}, wanted)

    if work == "convnet":
        return [
            way("bare loop", "bare"),
            way("bare loop, channels last", "bare", channels_last=True),
            way("equiloss", "equiloss", overrides=[]),
            *(
                way(f"equiloss, {setting}", "equiloss", overrides=[setting])
                for setting in ("model.compile=true", "trainer.precision=bf16-mixed")
            ),
        ]
    each_50 = "trainer.log_every_n_steps=50"
    return [
        way("bare loop", "bare"),
        way("Lightning, empty module", "lightning", style="empty"),
        way("Lightning, common style", "lightning", style="common"),
        way("equiloss as shipped", "equiloss", 1 / 0.70, overrides=[]),
        way("equiloss, a log line every 50 steps", "equiloss", 1 / 0.80, overrides=[each_50]),
        way(
            *("equiloss, every 50 steps, without parity", "equiloss"),
            overrides=[each_50, "parity=off"],
        ),
    ]
