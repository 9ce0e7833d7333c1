"""Whether a network fits the data, and what its behaviour means for how the work is split."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from equiloss.config import Config
from equiloss.errors import ConfigError, ModelError, first_line
from equiloss.preflight.behaviour import Effect, Found

log = logging.getLogger(__name__)

# A last batch of a smaller part of the others' rows is pointed out.
FEW = 16
DEVICES, MICRO_BATCHES = "trainer.devices", "trainer.micro_batch_size"
TRAINING = (DEVICES, MICRO_BATCHES)
# What an effect does, and on which keys the results then depend.
MEANINGS = {
    Effect.DRAWS: (
        "draws random numbers by batch (torch.nn.Dropout draws by sample here)",
        TRAINING,
    ),
    Effect.NEIGHBOURS: ("makes a sample's logits depend on the samples beside it", TRAINING),
    Effect.LEARNS: (
        "learns buffers from the samples of a forward pass, and the first rank's are kept",
        TRAINING,
    ),
    Effect.COUNTS: ("changes buffers in each forward pass", (MICRO_BATCHES,)),
    Effect.REMEMBERS: ("gives other logits for the same samples the second time", TRAINING),
    Effect.EVALUATION: (
        "evaluates a sample differently from pass to pass, or beside other samples",
        (DEVICES, "data.eval_batch_size"),
    ),
    Effect.UNKNOWN: ("could not pass some images before the first step", TRAINING),
}


def check_head(
    name: str, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Run a network on one blank image, and check that its head fits the data's classes.

    Args:
        name: The network's name, for error messages.
        model: Lazy layers of it get their sizes.
        num_classes: K.
        image_shape: (C, H, W) of one image.

    Raises:
        ModelError: for images that it cannot process, or logits of another shape than [N, K].
    """
    was_training = model.training
    model.eval()  # one row has no batch statistics
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *image_shape))
    except Exception as error:  # whatever the network raises
        size = "x".join(map(str, image_shape))
        raise ModelError(
            f"model {name!r} cannot process {size} images: {first_line(error)} "
            "(data.image_size=… resizes them)"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"model {name!r} gives {got} logits per image where the data has {num_classes} "
            "classes: its head must give one logit per class"
        )


def check_single_rows(
    config: Config,
    model: nn.Module,
    example_images: Callable[[int], Tensor],
    train_rows: int,
    world_size: int,
) -> None:
    """Refuse a split of the work in which a network meets a single row that it cannot train on.

    Batch normalisation has no variance of one value. Whether a network minds is tried out. A last
    batch of few rows is pointed out.

    Args:
        config: Sizes of batches and micro-batches.
        model: On the host; it is left as it was.
        example_images: Gives so many normalised training images.
        train_rows: Samples of the training split.
        world_size: Ranks, over all of which batch normalisation goes.

    Raises:
        ConfigError: naming the key, the batch and what the network says.
    """
    batch_size = min(config.data.batch_size, train_rows)
    size = config.trainer.micro_batch_size
    last = train_rows % batch_size
    if 0 < last <= batch_size // FEW:
        log.warning(
            "data.batch_size=%d: the last batch of each epoch has %d of its rows, and moves the "
            "weights as far as a whole one",
            batch_size,
            last,
        )
    single = [rows for rows in (batch_size, last) if rows and 1 in _passes(rows, world_size, size)]
    if not single:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            watched, images = copy.deepcopy(model).train(), example_images(2)
            watched(images)
        except Exception:  # then it is not the single row
            return
        try:
            watched(images[:1])
        except Exception as error:  # whatever a network of one's own raises
            key, of = "data.batch_size", f"{train_rows} training rows"
            if single[0] > world_size:
                key, of = "trainer.micro_batch_size", f"a batch of {single[0]}"
            given = config.data.batch_size if key == "data.batch_size" else size
            raise ConfigError(
                f"{key}={given} leaves a forward pass with a single row ({of}), and "
                f"model={config.model.name} cannot train on one: {first_line(error)}; choose "
                "another size"
            ) from error


def _passes(rows: int, world_size: int, size: int | None) -> list[int]:
    """Rows of each forward pass of a global batch, over all ranks.

    >>> _passes(5, 2, None), _passes(5, 2, 2), _passes(5, 1, 2)
    ([5], [4, 1], [2, 2, 1])
    """
    least, longer = divmod(rows, world_size)  # so many ranks have a row more
    most = least + (longer > 0)
    size = size or most

    def passed(own: int, first: int) -> int:
        return min(max(own - first, 0), size)

    return [
        longer * passed(least + 1, first) + (world_size - longer) * passed(least, first)
        for first in range(0, most, size)
    ]


def judge(config: Config, found: Sequence[Found], world_size: int) -> None:
    """Say where results depend on how the work is split, or refuse it where they may not.

    Args:
        config: The run's configuration.
        found: What was seen of the network.
        world_size: Ranks of the run.

    Raises:
        ConfigError: for the first line that there is, with trainer.reduction=bitwise (a shard is
            a pass of its own there, on one device too) and with parity.policy=raise.
    """
    bitwise = config.trainer.reduction == "bitwise"
    size = config.trainer.micro_batch_size
    split = {DEVICES} if world_size > 1 or bitwise else set()
    if bitwise or (size is not None and size < config.data.batch_size):
        split.add(MICRO_BATCHES)
    by_neighbours = any(each.effect == Effect.NEIGHBOURS for each in found)
    for effect, module, batch_norm in found:
        sentence, keys = MEANINGS[effect]
        mended = {DEVICES} if batch_norm else set()  # it goes over all ranks
        said = batch_norm and by_neighbours and effect == Effect.LEARNS
        seeded = bitwise and effect == Effect.DRAWS  # for each shard
        if said or seeded or not (split - mended).intersection(keys):
            continue
        depend = "may depend" if effect == Effect.UNKNOWN else "depend"
        line = f"{config.model.name}: {module} {sentence}: results {depend} on {' and '.join(keys)}"
        if bitwise or config.parity.policy == "raise":
            rule = "trainer.reduction=bitwise" if bitwise else "parity.policy=raise"
            raise ConfigError(f"{rule} refuses model={line}")
        log.warning("model=%s", line)
