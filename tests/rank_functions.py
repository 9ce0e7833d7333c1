"""What tests run on every rank of a real process group: importable by name in the rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equiloss.config.resolved import ResolvedConfig
from equiloss.distributed import collectives
from equiloss.distributed.gradient_sums import GradientSums
from equiloss.distributed.interruption import Interrupted
from equiloss.losses import Criterion, reduction
from equiloss.models.batch_norm import synchronise
from equiloss.training.extra_metrics import ExtraMetrics


def rank() -> int:
    return dist.get_rank()


def sums() -> dict[str, Any]:
    """Reductions of values that differ on each rank r: [r + 1, -r]."""
    own = torch.tensor([rank() + 1.0, -rank()], dtype=torch.float64)
    pending = collectives.start_sum(own)
    summed = pending.wait().tolist()
    return {
        "world_size": collectives.world_size(),
        "start_sum": summed,
        "sum": collectives.sum_over_ranks(own).tolist(),
        "max": collectives.max_over_ranks(own).tolist(),
        "own": own.tolist(),
        "pending": pending.work is not None,
    }


def two_sums_at_once() -> list[float]:
    """Two sums under way together, waited for in the other order."""
    first = collectives.start_sum(torch.tensor(1.0 + rank()))
    second = collectives.start_sum(torch.tensor(10.0 * (1 + rank())))
    return [second.wait().item(), first.wait().item()]


def gathered(counts: list[int]) -> tuple[list[list[float]], list[int]]:
    """Rows [n, 2] that know their rank and number, and integers [n], with `counts` on each rank."""
    own = counts[rank()]
    rows = (rank() + torch.arange(own) / 100).unsqueeze(-1).expand(own, 2)
    classes = torch.full((own,), rank())
    return collectives.gather_rows(rows).tolist(), collectives.gather_rows(classes).tolist()


def data_parallel_gradients(
    weights: Tensor,
    images: Tensor,
    target: Tensor,
    counts: list[int],
    micro_batch_size: int,
    choices: Sequence[dict[str, Any]],
) -> list[dict[str, list[list[float]]]]:
    """Gradients of a linear network, averaged over ranks as DDP averages them.

    For each choice of options: `rank_loss` is how this project reduces; `local_means` is the
    control, the mean of each rank's own mean.
    """
    own = _slice(counts)
    images, target = images[own], target[own]

    def averaged(loss: Callable[[Tensor], Tensor]) -> list[list[float]]:
        network = weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(network), network)
        mean: Tensor = collectives.sum_over_ranks(gradient) / collectives.world_size()
        return mean.tolist()

    def by_rank_loss(network: Tensor) -> Tensor:
        mass = collectives.sum_over_ranks(criterion.mass(target, torch.float64))
        parts = zip(images.split(micro_batch_size), target.split(micro_batch_size), strict=True)
        return sum(reduction.rank_loss(criterion(x @ network, y).total, mass) for x, y in parts)

    def by_local_mean(network: Tensor) -> Tensor:
        return reduction.mean(*criterion(images @ network, target))

    gradients = []
    for options in choices:
        criterion = Criterion("cross_entropy", **options)
        ours, control = averaged(by_rank_loss), averaged(by_local_mean)
        gradients.append({"rank_loss": ours, "local_means": control})
    return gradients


def _slice(counts: list[int]) -> slice:
    """This rank's rows, where rank r holds `counts[r]` of them."""
    first = sum(counts[: rank()])
    return slice(first, first + counts[rank()])


def evaluated(
    logits: Tensor, target: Tensor, counts: list[int], options: dict[str, Any]
) -> dict[str, Any]:
    """Figures of an evaluation whose rows are spread over the ranks by `counts`."""
    # Imported here: torchmetrics takes seconds, and the other ranks' functions do without it.
    from equiloss.training.metrics import EvaluationMetric

    own = _slice(counts)
    criterion = Criterion("cross_entropy", **options)
    metric = EvaluationMetric(logits.shape[1], ignore_index=-100)
    metric.update(logits[own], target[own], criterion(logits[own], target[own]))
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in metric.evaluate()._asdict().items()
    }


def own_tensor() -> Tensor:
    return torch.full((3,), float(rank()))


def one_rank_raises(culprit: int) -> float:
    """The other ranks wait in a collective for the culprit."""
    if rank() == culprit:
        raise LookupError(f"this is rank {culprit}'s own mistake")
    return collectives.sum_over_ranks(torch.ones(())).item()


def one_rank_dies(culprit: int) -> float:
    if rank() == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    return collectives.sum_over_ranks(torch.ones(())).item()


def cells_with_local_means(dtype: torch.dtype) -> list[Any]:
    """The matrix of gradients under the usual reduction."""
    from equiloss.invariance import gradients
    from equiloss.invariance.controls import local_means

    with local_means():
        return gradients.cells(dtype)


def run_in_rank(config: ResolvedConfig, directory: Path) -> None:
    """A whole run on every rank."""
    from equiloss.invariance.rank_runs import set_up_rank
    from equiloss.run import run

    set_up_rank()
    run(config, directory)


def train_mixed(directory: Path) -> None:
    """Fifteen steps with MixUp and CutMix on every rank."""
    from equiloss.invariance.rank_runs import Recorder, train

    directory.mkdir(parents=True, exist_ok=True)
    train(
        directory,
        {"trainer": {"max_steps": 15}, "data": {"augment": {"mixup": 0.4, "cutmix": 1.0}}},
        {"data": {"max_samples": 100, "batch_size": 47}},  # batches of 47, 47 and 6 rows
        callbacks=[Recorder(directory / "records.jsonl")],
    )


def train_bitwise(directory: Path, optimizer: str, steps: int, *changes: dict[str, Any]) -> None:
    """Float32 steps on every rank; an epoch has 25."""
    from equiloss.invariance.rank_runs import DEFAULTS, train

    if optimizer == "AdamW":
        DEFAULTS["optimizer"] = {"name": "AdamW", "lr": 0.003, "weight_decay": 0.01}
    train(directory, {"trainer": {"precision": "32-true", "max_steps": steps}}, *changes)


def train_with_unequal_threads(directory: Path, *changes: dict[str, Any]) -> None:
    from equiloss.invariance.rank_runs import train

    torch.set_num_threads(1 + rank())
    train(directory, *changes)


def train_bitwise_until(directory: Path, kill_in: int | None) -> None:
    """Three short epochs on every rank, killed in one of their 27 steps or not at all."""
    from equiloss.invariance.controls import Kill
    from equiloss.invariance.interruption import OPTIONS
    from equiloss.invariance.rank_runs import train

    exact = {"trainer": {"precision": "32-true", "reduction": "bitwise"}}
    kills = [] if kill_in is None else [Kill("in step", kill_in)]
    train(directory, OPTIONS, exact, callbacks=kills)


def train_fashion_mnist(directory: Path, reduction: str) -> None:
    """An epoch of the real Fashion-MNIST on every rank."""
    from equiloss.invariance.rank_runs import train

    train(
        directory,
        {"data": {"name": "fashion_mnist", "batch_size": 250, "augment": {"shift": 2}}},
        {"trainer": {"precision": "32-true", "reduction": reduction, "max_epochs": 1}},
    )


def train_noisy(directory: Path) -> None:
    """Ten steps of a network that draws from every generator, on every rank."""
    from equiloss.invariance.rank_runs import DEFAULTS, train

    DEFAULTS["model"] = {"name": "custom", "target": "stand_ins:noisy"}
    exact = {"precision": "32-true", "reduction": "bitwise", "max_steps": 10}
    train(directory, {"trainer": exact})


def run_until_out_of_time(config: ResolvedConfig, directory: Path) -> None:
    """A run that is interrupted after a step."""
    (directory / "results.json").unlink(missing_ok=True)  # a claim of the directory would do it
    with pytest.raises(Interrupted, match="max_time"):
        run_in_rank(config, directory)


class Activated(nn.BatchNorm2d):
    """Batch norm that does something more, as layers of other libraries do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


def batch_norm_passes(counts: list[int]) -> list[dict[str, Tensor]]:
    """Two training passes and an evaluation of a layer, with the gradients of the second."""
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.BatchNorm1d(5, dtype=torch.float64), (5,)),
        (nn.BatchNorm2d(5, momentum=None, dtype=torch.float64), (5, 3, 2)),
        (nn.BatchNorm2d(5, affine=False, dtype=torch.float64), (5, 3, 2)),
        (Activated(5, dtype=torch.float64), (5, 3, 2)),
    ]
    found = []
    for layer, shape in cases:
        synchronise(layer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            layer.zero_grad()
            everything = torch.randn(sum(counts), *shape, generator=generator, dtype=torch.float64)
            images = (7 + 3 * everything)[_slice(counts)].requires_grad_()
            output = layer(images)
            output.pow(3).sum().backward()
        assert images.grad is not None
        found.append(
            {
                "output": output.detach(),
                "gradient": images.grad,
                **{f"parameter {name}": p.grad for name, p in layer.named_parameters()},
                **dict(layer.named_buffers()),
                "evaluated": layer.eval()(images).detach(),
            }
        )
    return found


class _Wrong(Callback):
    """Makes one rank do something else while a run trains."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.culprit = rank() == 1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.name == "other weights" and self.culprit:
            with torch.no_grad():
                next(pl_module.parameters()).add_(1e-3)
        if self.name == "another learning rate" and self.culprit:
            scheduler = pl_module.lr_schedulers()
            scheduler.base_lrs = [2 * lr for lr in scheduler.base_lrs]
            for group in pl_module.the_optimizer.param_groups:
                group["lr"] *= 2
        if self.name == "a negated gradient" and self.culprit:
            for parameter in pl_module.parameters():
                parameter.register_hook(torch.neg)
        if self.name == "a parameter left out":
            for parameter in list(pl_module.parameters())[-1:]:
                own: list[Tensor] = []
                parameter.register_hook(own.append)
                parameter.own = own

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.name == "a parameter left out":
            # As if it had not been reduced: what the passes of this rank have brought.
            parameter: Any = list(pl_module.parameters())[-1]
            parameter.grad.copy_(torch.stack(parameter.own).sum(0))
            parameter.own.clear()


def verdicts(
    directory: Path, wrongs: Sequence[str], options: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What parity says of short runs with something wrong in each."""
    from unittest import mock

    from equiloss.invariance.controls import local_means
    from equiloss.invariance.rank_runs import set_up_rank
    from equiloss.models.dropout import RowKeys
    from equiloss.run import run
    from support import composed

    set_up_rank()
    right, keyed = reduction.rank_loss, RowKeys.bound_to
    patches: dict[str, Callable[[], Any]] = {
        "no factor of ranks": lambda: mock.patch.object(reduction, "rank_loss", reduction.mean),
        "local means": local_means,
        "twice the gradient": lambda: mock.patch.object(
            reduction, "rank_loss", lambda *sums: 2 * right(*sums)
        ),
        "masks by rank": lambda: mock.patch.object(
            RowKeys,
            "bound_to",
            lambda self, index, epoch: keyed(self, index + 1000 * rank(), epoch),
        ),
    }
    found = {}
    for wrong in wrongs:
        config = composed(*options, f"trainer.devices={collectives.world_size()}")
        with patches.get(wrong, nullcontext)():
            result = run(config, directory / wrong, callbacks=[_Wrong(wrong)])
        found[wrong] = result.parity
    return found


def extra_metrics_of(
    extra: dict[str, Any], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Metrics of batches (probabilities, classes), of which each rank has a part."""
    metrics = ExtraMetrics(extra, batches[0][0].shape[1])
    for probabilities, target in batches:
        parts = zip(
            probabilities.tensor_split(collectives.world_size()),
            target.tensor_split(collectives.world_size()),
            strict=True,
        )
        metrics.update(*list(parts)[collectives.rank()])
    return metrics.take()


def numbers_with_gradients(dtype: torch.dtype, numbers: torch.dtype) -> dict[str, Any]:
    """Numbers of their own of two steps [r + 1, r], and the gradients that they travel with.

    The second parameter is one that no rank's loss depends on.
    """
    module = nn.ParameterList([torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=dtype)])
    sums = GradientSums()
    with sums.joining(module, numbers):
        model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    sums.settle(model)
    assert model.reducer._rebuild_buckets()  # every parameter was in that pass
    found = []
    for step in (1, 2):
        own = torch.tensor([step * (rank() + 1.0), rank()], dtype=numbers)
        model.reducer.prepare_for_backward([])
        module.zero_grad()
        sums.start((module[0] * own[0].to(dtype)).sum(), own, list(module)).backward()
        found.append(sums.finish().tolist())
    gradients = [[value.item() for value in parameter.grad] for parameter in module]
    return {"sums": found, "gradients": gradients, "names": list(module.state_dict())}
