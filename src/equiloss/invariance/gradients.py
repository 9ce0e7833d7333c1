"""The gradient of one step, for every split of the global batch, against one device.

Each rank of a real process group runs Lightning's Trainer with the project's own step, one
optimizer step for each cell. The reference is what PyTorch gives on one device for the whole
batch, `F.cross_entropy(reduction="mean")` and autograd: none of our code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from equiloss.data.sampler import part_of
from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance import references
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.rank_runs import config, set_up_rank
from equiloss.invariance.steps import (
    CLASSES,
    ROWS,
    WORLD_SIZES,
    Step,
    cases,
    global_batch,
    micro_batch_size,
    network,
    steps,
)
from equiloss.losses.criterion import Criterion
from equiloss.models.dropout import RowKeys
from equiloss.training.classifier import Classifier
from equiloss.training.step import MicroBatches
from equiloss.training.trainer import strategy

DTYPES = (torch.float64, torch.float32)
# Relative to the gradient's norm: float64 rounds at 1e-16 and float32 at 6e-8, some ten layers
# and sums of 59 rows deep.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}
MASSES_DIFFER = 0.1


def measure(world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Compare the gradient of every step with one device's: a part for each dtype."""
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
    """On every rank: take every step of one world size, a cell for each."""
    set_up_rank()
    taken = zip(steps(collectives.world_size()), _gradients(dtype), strict=True)
    return [_cell(step, gradient) for step, gradient in taken]


def _cell(step: Step, gradient: Tensor) -> Cell:
    """Compare a step's gradient [P], and that of a mean of local means, with one device's."""
    world_size, dtype = collectives.world_size(), gradient.dtype
    batch, case = global_batch(step, dtype), cases(world_size)[step.case]
    reference = references.reference(batch, case)
    control = references.local_means(batch, case, step)
    norm = float(reference.norm()) or 1.0
    masses = references.local_masses(batch, case, step)
    spread = (max(masses) - min(masses)) / (sum(masses) / len(masses) or 1.0)
    return Cell(
        row=f"{step.case}, {step.loss}",
        column=f"W={world_size}, m={step.micro_batches}",
        figure=float((gradient - reference).norm()) / norm,
        bound=0.0 if step.case == "everything ignored" else BOUNDS[dtype],
        control=float((control - reference).norm()) / norm,
        control_differs=spread > MASSES_DIFFER,
    )


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    """Synchronised gradient [P] of each of `steps`, as the optimizer would get it."""
    world_size = collectives.world_size()
    precision: Literal["64-true", "32-true"] = "64-true" if dtype == torch.float64 else "32-true"
    settings = config(
        {
            "trainer": {"precision": precision, "devices": world_size},
            # The gradients are taken out before the step: the weights stay as they are.
            "optimizer": {"weight_decay": 0.0, "options": {"momentum": 0.0, "nesterov": False}},
        }
    )
    classifier = Classifier(
        network(dtype),
        Criterion("cross_entropy"),
        settings.config,
        row_keys=RowKeys(0),
        num_classes=CLASSES,
        split_sizes={"train": ROWS},
        total_steps=len(steps(world_size)),
    )
    capture = _Capture()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        precision=precision,
        max_epochs=1,
        logger=False,
        callbacks=[capture],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        strategy=strategy(world_size),
        plugins=[LightningEnvironment()],
    )
    # To a loader, a list is a dataset.
    slices: Any = [_own_slice(global_batch(step, dtype)) for step in steps(world_size)]
    trainer.fit(classifier, DataLoader(slices, batch_size=None))
    # The steps were taken by a group of the size asked for.
    assert trainer.world_size == world_size
    return capture.gradients


def _own_slice(batch: Batch) -> Batch:
    """This rank's rows of a global batch."""
    rows = part_of(batch.rows, dist.get_rank(), collectives.world_size())
    return batch._replace(
        images=batch.images[rows], target=batch.target[rows], index=batch.index[rows]
    )


class _Capture(Callback):
    """Gives each step its options, keeps its gradient, and leaves the weights as they are."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, batch: Batch, batch_idx: int
    ) -> None:
        world_size = collectives.world_size()
        step = steps(world_size)[batch_idx]
        case = cases(world_size)[step.case]
        pl_module.criterion = Criterion(step.loss, **case.options)
        size = micro_batch_size(len(case.target), step.micro_batches)
        pl_module.step.accumulate = MicroBatches(pl_module, size)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:  # type: ignore[override]
        gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient in gradients:
            gradient.zero_()
