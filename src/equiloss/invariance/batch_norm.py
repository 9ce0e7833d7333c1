"""The gradient through batch normalisation over ranks, against torch's own layer on one device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.data.sampler import part_of
from equiloss.distributed import collectives
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.cells import Cell, Part
from equiloss.invariance.gradients import BOUNDS, DTYPES
from equiloss.invariance.steps import WORLD_SIZES
from equiloss.models.batch_norm import synchronise

# Of 3 rows, a fourth rank has none.
ROWS = (59, 3)
CLASSES = 5


def measure(world_sizes: tuple[int, ...] = WORLD_SIZES) -> dict[str, Part]:
    """Compare a network's gradient and running statistics with one device's."""
    part = Part(
        "Batch normalisation",
        "A network with two layers of it and a global batch of 59 or 3 rows on 1 to 4 processes "
        "(W). Norm of the difference to torch's own layers on one device, relative to theirs; at "
        f"most {BOUNDS[torch.float64]:g} in float64 and {BOUNDS[torch.float32]:g} in float32. "
        "The control normalises each process's rows by themselves.",
    )
    for world_size in world_sizes:
        part.cells += run_ranks(cells, world_size)[0]
    return {"batch_norm": part}


def cells() -> list[Cell]:
    """On every rank: pass every batch forward and backward, a cell for each figure."""
    world_size = collectives.world_size()
    found = []
    for dtype in DTYPES:
        for rows in ROWS:
            images, target = _batch(rows, dtype)
            own = part_of(rows, collectives.rank(), world_size)
            expected = _passed(_network(dtype), images, target, rows)
            network = _network(dtype)
            synchronise(network)
            ours = _passed(network, images[own], target[own], rows)
            # A layer by itself needs two rows.
            alone = rows // world_size > 1
            local = _passed(_network(dtype), images[own], target[own], rows) if alone else ours
            name = str(dtype).removeprefix("torch.")
            for row, reference, value, control in zip(
                ("gradient", "statistics"),
                expected,
                _over_ranks(ours),
                _over_ranks(local),
                strict=True,
            ):
                norm = float(reference.norm())
                found.append(
                    Cell(
                        row=f"{name}, {rows} rows, {row}",
                        column=f"W={world_size}",
                        figure=float((value - reference).norm()) / norm,
                        bound=BOUNDS[dtype],
                        control=float((control - reference).norm()) / norm if alone else None,
                        control_differs=alone and world_size > 1,
                    )
                )
    return found


def _over_ranks(passed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient, which adds up, and running statistics, of which the first rank's are kept."""
    gradient, statistics = passed
    collectives.broadcast_from_first([statistics])
    return collectives.sum_over_ranks(gradient), statistics


def _network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8)]
    return nn.Sequential(*layers, nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).to(dtype)


def _batch(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    images = 2 + 3 * torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(CLASSES, (rows,), generator=generator)


def _passed(network: nn.Module, images: Tensor, target: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean's gradient [P], and the running statistics [B]."""
    loss = F.cross_entropy(network(images), target, reduction="sum") / rows
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    gradient = torch.cat([part.flatten() for part in gradients])
    floating = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    return gradient, torch.cat(floating)
