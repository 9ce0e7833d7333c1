"""Which weights a run begins with: those of a checkpoint to evaluate, or to start a fit from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from equiloss.errors import CheckpointError
from equiloss.models import weights
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from equiloss.training.state import RunState

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

log = logging.getLogger(__name__)


def give_weights(module: Classifier, *, continued: bool) -> None:
    """Load the weights that the configuration names: to evaluate, or for a fit to start from.

    Args:
        module: Gets them.
        continued: Whether the fit goes on from a state of its own.

    Raises:
        CheckpointError: as `load_weights`, `start_from` and `weights.give`.
    """
    config = module.config
    if config.task != "fit":
        load_weights(module, Path(str(config.ckpt_path)))
    elif config.init_from is not None and not continued:
        log.info("starting with %s", start_from(module, Path(config.init_from)))
    elif config.model.weights is not None and not continued:
        classes = module.evaluation.num_classes
        log.info("starting with %s", weights.give(module.model, config.model, classes))


def start_from(module: Classifier, path: Path) -> str:
    """Give a network the weights of a checkpoint, but for a head of another size.

    Returns:
        What was taken, in words.

    Raises:
        CheckpointError: if the file is missing, damaged or none of ours, or has other tensors.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    RunState.load(loaded, path)
    own = {n: t for n, t in module.state_dict().items() if n.startswith("model.")}
    given = {n: t for n, t in loaded["state_dict"].items() if n.startswith("model.")}
    fits_not = [n for n in own if n not in given or own[n].shape != given[n].shape]
    fits_not += sorted(given.keys() - own.keys())
    head = [n for n in own if n.rpartition(".")[0] == [*own][-1].rpartition(".")[0]]
    odd = [name for name in fits_not if name not in head]
    if odd:
        raise CheckpointError(
            f"init_from={path} does not fit model {module.config.model.name!r}: "
            f"{len(odd)} tensors are others, {odd[0]} the first"
        )
    kept = {name: tensor for name, tensor in given.items() if name not in fits_not}
    module.load_state_dict(kept, strict=False)
    new = f"; the head is new ({', '.join(fits_not)})" if fits_not else ""
    return f"{len(kept)} tensors from {path}{new}"


def load_weights(module: Classifier, path: Path) -> dict[str, float]:
    """Load a checkpoint's weights into a classifier.

    Returns:
        The validation metrics that were current when it was saved.

    Raises:
        CheckpointError: if the file is missing or damaged, or was made for other classes or
            another network.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    state = RunState.load(loaded, path)
    classes = module.evaluation.num_classes
    if state.num_classes != classes:
        raise CheckpointError(
            f"{path} was trained on {state.num_classes} classes, the data has {classes}"
        )
    try:
        module.load_state_dict(loaded["state_dict"])
    except RuntimeError as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} does not fit model {module.config.model.name!r}: {first}"
        ) from error
    return state.progress.of_split("val")
