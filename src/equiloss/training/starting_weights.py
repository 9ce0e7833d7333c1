"""Which weights a run begins with: those of a checkpoint to evaluate, or to start a fit from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from equiloss.errors import CheckpointError
from equiloss.models import weights
from equiloss.models.head import paths_of
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
    """Give a network the weights of a checkpoint, fitted as those of `model.weights` are.

    Returns:
        What was taken, in words.

    Raises:
        CheckpointError: if the file is missing, damaged or none of ours, or has other tensors.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    RunState.load(loaded, path)
    model, own = module.model, "model."
    state = loaded["state_dict"].items()
    given = {name.removeprefix(own): each for name, each in state if name.startswith(own)}
    fitted = weights.fit(given, model, paths_of(model, module.evaluation.num_classes))
    if fitted.faults:
        raise CheckpointError(weights.refusal(fitted, f"init_from={path}", module.config.model))
    model.load_state_dict(fitted.taken, strict=False)
    return f"{len(fitted.taken)} tensors from {path}{weights.remarks(fitted)}"


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
