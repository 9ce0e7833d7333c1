"""The gradient of one step, for every split of the global batch, against one device.

Each rank of a real process group runs Lightning's Trainer with the project's own step, one
optimizer step for each cell. The reference is what PyTorch gives on one device for the whole
batch, `F.cross_entropy(reduction="mean")` and autograd: none of our code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance import references
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.rank_runs import config, in_rank, trainer_plugins
from equiloss.invariance.steps import (
    CLASSES,
    ROWS,
    WORLD_SIZES,
    Step,
    cases,
    global_batch,
    micro_batch_size,
    network,
    own_rows,
    steps,
)
from equiloss.losses.criterion import Criterion
from equiloss.models.dropout import RowKeys
from equiloss.training.classifier import Classifier

DTYPES = (torch.float64, torch.float32)
# Relative to the gradient's norm: float64 rounds at 1e-16 and float32 at 6e-8, some ten layers
# and sums of 59 rows deep.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}
MASSES_DIFFER = 0.1


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
    world_size = collectives.world_size()
    found = _gradients(dtype)
    made = []
    for step, gradient in found:
        batch = global_batch(step, dtype)
        case = cases(world_size)[step.case]
        reference, control = (
            references.reference(batch, case),
            references.local_means(batch, case, step),
        )
        norm = float(reference.norm()) or 1.0
        masses = references.local_masses(batch, case, step)
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


def _gradients(dtype: torch.dtype) -> list[tuple[Step, Tensor]]:
    """Every step's synchronised gradient, as the optimizer would get it."""
    precision: Literal["64-true", "32-true"]
    precision = "64-true" if dtype == torch.float64 else "32-true"
    settings = config(
        {
            "trainer": {"precision": precision, "devices": collectives.world_size()},
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
        devices=collectives.world_size(),
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
    wanted = steps(collectives.world_size())
    # Every step was taken, by a group of the size asked for.
    assert len(capture.gradients) == len(wanted)
    assert trainer.world_size == collectives.world_size()
    return list(zip(wanted, capture.gradients, strict=True))


class _Slices(IterableDataset[Batch]):
    """This rank's slice of each step's global batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return len(steps(collectives.world_size()))

    def __iter__(self) -> Iterator[Batch]:
        for step in steps(collectives.world_size()):
            batch = global_batch(step, self.dtype)
            rows = own_rows(len(batch.target), torch.distributed.get_rank())
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
        world_size = collectives.world_size()
        step = steps(world_size)[batch_idx]
        case = cases(world_size)[step.case]
        pl_module.criterion = Criterion(step.loss, **case.options)
        pl_module.step.micro_batch_size = micro_batch_size(len(case.target), step)

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
