"""Gradients to compare the matrix with: one device's, and those of a mean of local means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.data.sampler import part_of
from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.invariance.steps import CLASSES, Case, Step, micro_batch_size, network


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
    classes = target[target != -100]
    weight = torch.tensor(case.options.get("weight", [1.0] * CLASSES), dtype=torch.float64)
    return float(weight[classes].sum())


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def reference(batch: Batch, case: Case) -> Tensor:
    """The gradient [P] of PyTorch's mean over the global batch on one device: no code of ours."""
    model = network(batch.images.dtype)
    return _gradient(_plain_loss(model(batch.images), batch.target, case), model)


def _local_parts(batch: Batch, step: Step) -> list[list[tuple[Tensor, Tensor]]]:
    """Images and targets of each micro-batch of each rank."""
    rows, world_size = len(batch.target), collectives.world_size()
    size = micro_batch_size(rows, step.micro_batches)
    parts = []
    for rank in range(world_size):
        own = part_of(rows, rank, world_size)
        fields = (batch.images[own], batch.target[own])
        parts.append(list(zip(*(torch.split(field, size) for field in fields), strict=True)))
    return parts


def local_masses(batch: Batch, case: Case, step: Step) -> list[float]:
    """The denominator of each micro-batch's own mean."""
    return [_mass(target, case) for parts in _local_parts(batch, step) for _, target in parts]


def local_means(batch: Batch, case: Case, step: Step) -> Tensor:
    """The gradient [P] of the usual loss: means of micro-batches, averaged over them and ranks."""
    model = network(batch.images.dtype)
    ranks = _local_parts(batch, step)
    total = torch.zeros((), dtype=batch.images.dtype)
    for parts in ranks:
        for images, target in parts:
            total = total + _plain_loss(model(images), target, case) / len(parts) / len(ranks)
    return _gradient(total, model)
