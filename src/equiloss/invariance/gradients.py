"""The gradient of one step, for every split of the global batch, against one device.

Each rank of a real process group runs Lightning's Trainer with the project's own step, one
optimizer step for each cell. The reference is what PyTorch gives on one device for the whole
batch, `F.cross_entropy(reduction="mean")` and autograd: none of our code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from equiloss.classifier import Classifier
from equiloss.data.sampler import rank_rows
from equiloss.data.sources import Batch
from equiloss.dropout import RowKeys
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.here import config, in_rank, trainer_plugins
from equiloss.losses import reduction
from equiloss.losses.criterion import Criterion
from equiloss.models import ConvNet
from equiloss.testing import run_ranks

CLASSES = 5
# Slices of 1 to 4 ranks have 5 equal or nearly equal micro-batches, and none is a multiple of 4.
ROWS = 59
WORLD_SIZES = (1, 2, 3, 4)
MICRO_BATCHES = (1, 2, 5)
LOSSES = ("softmax_nll", "log_softmax_nll", "cross_entropy")
DTYPES = (torch.float64, torch.float32)
# Relative to the gradient's norm: float64 rounds at 1e-16 and float32 at 6e-8, some ten layers
# and sums of 59 rows deep.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}
MASSES_DIFFER = 0.1

WEIGHT = [0.3, 2.5, 1.0, 0.7, 4.0]


class Case(NamedTuple):
    """Options of the loss, and a global batch for them."""

    options: dict[str, Any]
    target: Tensor
    """Of the global batch: [N] classes, or [N, K] probabilities."""


def cases(world_size: int) -> dict[str, Case]:
    """What a batch may hold, by name.

    >>> list(cases(2))[:3]
    ['weights', 'label smoothing', 'ignored rows']
    """
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    ignored = target.masked_fill(torch.rand(ROWS, generator=generator) < 0.4, -100)
    soft = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)
    one_rank = target.clone()
    one_rank[rank_rows(ROWS, world_size - 1, world_size)] = -100
    everything = {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": -100}
    found = {
        "weights": Case({"weight": WEIGHT}, target),
        "label smoothing": Case({"label_smoothing": 0.1}, target),
        "ignored rows": Case({"ignore_index": -100}, ignored),
        "weights, smoothing, ignored": Case(everything, ignored),
        "soft targets": Case({}, soft),
        "everything ignored": Case(everything, torch.full_like(target, -100)),
    }
    if world_size > 1:
        found["a rank with all ignored"] = Case(everything, one_rank)
        found["a rank without rows"] = Case(everything, target[: world_size - 1])
    return found


@dataclass(frozen=True)
class Step:
    """A cell to be: one optimizer step."""

    case: str
    loss: str
    micro_batches: int


def steps(world_size: int) -> list[Step]:
    """Every step of a world size."""
    return [
        Step(case, loss, micro_batches)
        for case in cases(world_size)
        for loss in LOSSES
        for micro_batches in MICRO_BATCHES
    ]


def measure(world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """The matrix, as a part for each dtype."""
    parts = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        part = Part(
            f"Gradient of one step, {name}",
            f"A global batch of {ROWS} rows on 1 to 4 processes (W), each slice in 1, 2 or 5 "
            "micro-batches (m). Difference to the gradient of "
            '`F.cross_entropy(reduction="mean")` on one device, relative to its norm; at most '
            f"{BOUNDS[dtype]:g}. A batch with everything ignored has a gradient of exactly 0.",
        )
        for world_size in world_sizes:
            part.cells += run_ranks(cells, world_size, dtype)[0]
        parts[f"gradients_{name}"] = part
    return parts


def cells(dtype: torch.dtype) -> list[Cell]:
    """On every rank: the cells of one world size."""
    in_rank()
    world_size = reduction.world_size()
    found = _gradients(dtype)
    made = []
    for step, gradient in found:
        batch = _batch(step, dtype)
        case = cases(world_size)[step.case]
        reference, control = _reference(batch, case), _local_means(batch, case, step)
        norm = float(reference.norm()) or 1.0
        masses = _local_masses(batch, case, step)
        spread = (max(masses) - min(masses)) / (sum(masses) / len(masses) or 1.0)
        nothing = step.case == "everything ignored"
        made.append(
            Cell(
                row=f"{step.case}, {step.loss}",
                column=f"W={world_size}, m={step.micro_batches}",
                figure=float((gradient - reference).norm()) / norm,
                bound=0.0 if nothing else BOUNDS[dtype],
                control=float((control - reference).norm()) / norm,
                control_differs=spread > MASSES_DIFFER,
            )
        )
    return made


def network(dtype: torch.dtype) -> nn.Module:
    """The same small network on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(CLASSES, 1, widths=(8,)).to(dtype)


def _gradients(dtype: torch.dtype) -> list[tuple[Step, Tensor]]:
    """Every step's synchronised gradient, as the optimizer would get it."""
    precision: Literal["64-true", "32-true"]
    precision = "64-true" if dtype == torch.float64 else "32-true"
    settings = config(
        {
            "trainer": {"precision": precision, "devices": reduction.world_size()},
            "data": {"name": "custom", "target": "unused:unused", "batch_size": ROWS},
            # The gradients are taken out before the step: the weights stay as they are.
            "optimizer": {"weight_decay": 0.0, "options": {"momentum": 0.0, "nesterov": False}},
        }
    )
    classifier = Classifier(
        network(dtype),
        Criterion("cross_entropy"),
        settings.config,
        rows=RowKeys(0),
        num_classes=CLASSES,
        split_sizes={"train": ROWS},
    )
    capture = _Capture()
    trainer = Trainer(
        accelerator="cpu",
        devices=reduction.world_size(),
        precision=precision,
        max_epochs=1,
        logger=False,
        callbacks=[capture],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_plugins(),
    )
    trainer.fit(classifier, DataLoader(_Slices(dtype), batch_size=None))
    wanted = steps(reduction.world_size())
    # Every step was taken, by a group of the size asked for.
    assert len(capture.gradients) == len(wanted)
    assert trainer.world_size == reduction.world_size()
    return list(zip(wanted, capture.gradients, strict=True))


class _Slices(IterableDataset[Batch]):
    """This rank's slice of each step's global batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return len(steps(reduction.world_size()))

    def __iter__(self) -> Iterator[Batch]:
        for step in steps(reduction.world_size()):
            batch = _batch(step, self.dtype)
            rows = _own_rows(len(batch.target), torch.distributed.get_rank())
            yield Batch(batch.images[rows], batch.target[rows], batch.index[rows], 0)


class _Capture(Callback):
    """Gives each step its options, keeps its gradient, and leaves the weights as they are."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        batch: Batch,
        batch_idx: int,
    ) -> None:
        world_size = reduction.world_size()
        step = steps(world_size)[batch_idx]
        case = cases(world_size)[step.case]
        pl_module.criterion = Criterion(step.loss, **case.options)
        pl_module.step.micro_batch_size = _micro_batch_size(len(case.target), step)

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        optimizer: Optimizer,
    ) -> None:
        gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient in gradients:
            gradient.zero_()


def _own_rows(rows: int, rank: int) -> slice:
    return rank_rows(rows, rank, reduction.world_size())


def _micro_batch_size(rows: int, step: Step) -> int:
    """Rows per forward pass that cut the longest slice into `step.micro_batches`."""
    longest = -(-rows // reduction.world_size())
    return -(-longest // step.micro_batches)


def _batch(step: Step, dtype: torch.dtype) -> Batch:
    """The global batch of a step."""
    target = cases(reduction.world_size())[step.case].target
    if target.is_floating_point():
        target = target.to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(images[: len(target)], target, torch.arange(len(target)), 0)


def _plain_loss(logits: Tensor, target: Tensor, case: Case) -> Tensor:
    """PyTorch's own mean; 0 where it would be NaN."""
    options = dict(case.options)
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"], dtype=logits.dtype)
    loss = F.cross_entropy(logits, target, **options)
    return loss if _mass(target, case) > 0 else logits.sum() * 0


def _mass(target: Tensor, case: Case) -> float:
    """The denominator of PyTorch's mean."""
    if target.is_floating_point():
        return len(target)
    kept = target[target != -100]
    weight = torch.tensor(case.options.get("weight", [1.0] * CLASSES), dtype=torch.float64)
    return float(weight[kept].sum())


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _reference(batch: Batch, case: Case) -> Tensor:
    """One device, one batch, no code of ours."""
    model = network(batch.images.dtype)
    return _gradient(_plain_loss(model(batch.images), batch.target, case), model)


def _local_parts(batch: Batch, step: Step) -> list[list[tuple[Tensor, Tensor]]]:
    """Images and targets of each micro-batch of each rank."""
    size = _micro_batch_size(len(batch.target), step)
    found = []
    for rank in range(reduction.world_size()):
        rows = _own_rows(len(batch.target), rank)
        images, target = batch.images[rows], batch.target[rows]
        parts = zip(torch.split(images, size), torch.split(target, size), strict=True)
        found.append(list(parts))
    return found


def _local_masses(batch: Batch, case: Case, step: Step) -> list[float]:
    return [_mass(target, case) for parts in _local_parts(batch, step) for _, target in parts]


def _local_means(batch: Batch, case: Case, step: Step) -> Tensor:
    """The control: the mean over ranks, of the mean over micro-batches, of each one's mean."""
    model = network(batch.images.dtype)
    ranks = _local_parts(batch, step)
    total = torch.zeros((), dtype=batch.images.dtype)
    for parts in ranks:
        for images, target in parts:
            total = total + _plain_loss(model(images), target, case) / len(parts) / len(ranks)
    return _gradient(total, model)
