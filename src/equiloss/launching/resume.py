"""Whether a configuration may go on with the run that a directory holds, or must leave it alone.

Naming a directory again continues the run in it, unless `resume=never`. What the run computes
must then be what it was: a difference is refused, naming the key. How it computes it (devices,
micro-batches, workers) may change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from equiloss.config import LoggerConfig
from equiloss.config.resolved import PRESENTATION, ResolvedConfig, from_stored, leaves
from equiloss.errors import ConfigError, RecordError, printable
from equiloss.launching.lock import hold
from equiloss.losses import registry
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import read_yaml
from equiloss.records.results import Result
from equiloss.records.run_dir import CONFIG, METRICS, has_state, written

_UNSET = object()
WAY_OUT = "name another directory with hydra.run.dir=…, or remove this one"
# How the numbers are computed, written down or chosen from, not what they are.
MAY_CHANGE = PRESENTATION | {
    "trainer.accelerator",
    "trainer.devices",
    "trainer.threads",
    "trainer.max_time",
    "trainer.rank_timeout_s",
    "trainer.micro_batch_size",
    "data.root",
    "data.table",
    "data.download",
    "model.download",
    "data.num_workers",
    "data.worker_timeout_s",
    "data.cache",
    "data.eval_batch_size",
    "checkpoint.every_n_steps",
    *(f"logger.{key}" for key, _ in leaves(asdict(LoggerConfig()))),
    "parity.policy",
    "objective",
    "test_weights",
}


class Change(NamedTuple):
    """A key whose value is not the one that a directory's run began with."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{printable(self.key)} was {_shown(self.before)} and is {_shown(self.after)}"


@contextmanager
def claim(run_dir: Path, resolved: ResolvedConfig) -> Iterator[bool]:
    """Hold a run directory for this process, ready for the run, while the context lasts.

    Nothing is removed here: what an earlier attempt left goes once the run has passed its
    preflight (see `equiloss.records.run_dir.clear`).

    Yields:
        Whether there is something to do: False if the directory holds this very run, completed.

    Raises:
        ConfigError: if another process holds the directory, if it holds a run of another
            configuration, any run with `resume=never`, or what no run of ours has left. The
            directory is left as it was.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold(run_dir, resolved.config.in_use):
        todo = _is_to_do(run_dir, resolved)
        if todo:
            write_atomically(run_dir / CONFIG, resolved.text)
        yield todo


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The keys in which two plain configurations differ.

    >>> [str(change) for change in changes({"data": {"batch_size": 50}}, {"seed": 1})]
    ['data.batch_size was 50 and is not set', 'seed was not set and is 1']
    """
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        Change(key, old.get(key, _UNSET), new.get(key, _UNSET))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _UNSET) != new.get(key, _UNSET)
    ]


def _is_to_do(run_dir: Path, resolved: ResolvedConfig) -> bool:
    """Whether a directory is there for a run; raises where it is another one's."""
    stored = _stored(run_dir)
    completed = is_completed(run_dir)
    checkpoint = has_state(run_dir)
    if stored is None or not (completed or checkpoint or (run_dir / METRICS).exists()):
        return True  # nothing, or a run that failed before its first step
    kind = "completed run" if completed else "run"
    if resolved.config.resume == "never" or resolved.config.task != "fit":
        raise ConfigError(f"{run_dir} already holds a {kind}: {WAY_OUT}")
    allowed = PRESENTATION if completed else MAY_CHANGE
    different = [c for c in changes(stored, resolved.plain) if c.key not in allowed]
    if different:
        raise ConfigError(
            f"{run_dir} already holds a {kind} of another configuration "
            f"({'; '.join(map(str, different))}): {WAY_OUT}"
        )
    return not completed


def is_completed(run_dir: Path) -> bool:
    """Whether a directory holds the result of a completed run."""
    try:
        return Result.read(run_dir).status == "completed"
    except RecordError:
        return False  # there is none, or none that can be read


def _stored(run_dir: Path) -> dict[str, Any] | None:
    """The configuration of the run that a directory holds, as it would be stored today.

    Raises:
        ConfigError: if something is there that no run of ours has left: it must not be replaced.
    """
    file = run_dir / CONFIG
    if not os.path.lexists(file):
        left = sorted(printable(str(path.relative_to(run_dir))) for path in written(run_dir))
        if left:
            raise ConfigError(
                f"{run_dir} holds {left[0]} and no {CONFIG} that tells whose it is: {WAY_OUT}"
            )
        return None
    try:
        stored, why = from_stored(read_yaml(file)), ""
    except RecordError as error:
        stored, why = None, f" (it {error.why})"
    if stored is None:
        raise ConfigError(f"{file} is no configuration of a run of equiloss{why}: {WAY_OUT}")
    return stored | {"loss": registry.with_defaults(stored["loss"])}


def _shown(value: Any) -> str:
    return "not set" if value is _UNSET else json.dumps(value)
