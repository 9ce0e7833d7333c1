"""Who may write into a run directory, and whether a configuration continues what it holds.

Naming a directory again continues the run in it, unless `resume=never`. What the run computes
must then be what it was: a difference is refused, naming the key. How it computes it (devices,
micro-batches, workers) may change.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from equiloss.config import LoggerConfig
from equiloss.config.resolved import PRESENTATION, ResolvedConfig, leaves
from equiloss.errors import ConfigError
from equiloss.records.run_dir import LAST_CHECKPOINT, LOCK, TRACEBACK, TRACKERS

# How the numbers are computed, written down or chosen from, not what they are.
MAY_CHANGE = PRESENTATION | {
    "trainer.accelerator",
    "trainer.devices",
    "trainer.threads",
    "trainer.micro_batch_size",
    "data.root",
    "data.download",
    "data.num_workers",
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
        return f"{self.key} was {_shown(self.before)} and is {_shown(self.after)}"


@contextmanager
def claim(run_dir: Path, resolved: ResolvedConfig) -> Iterator[bool]:
    """Hold a run directory for this process, ready for the run, while the context lasts.

    Yields:
        Whether there is something to do: False if the directory holds this very run, completed.

    Raises:
        ConfigError: if another process holds the directory, if it holds a run of another
            configuration, or any run with `resume=never`. The directory is left as it was.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with hold(run_dir, wait=resolved.config.in_use == "wait"):
        todo = _prepare(run_dir, resolved)
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


def _prepare(run_dir: Path, resolved: ResolvedConfig) -> bool:
    """Make the directory ready for a run from its start, or for one that continues."""
    from equiloss.records.results import Result
    from equiloss.records.run_dir import CONFIG, METRICS, RESULTS

    config = run_dir / CONFIG
    checkpoint = run_dir / LAST_CHECKPOINT
    results = run_dir / RESULTS
    completed = results.is_file() and Result.read(run_dir).status == "completed"
    began = completed or checkpoint.exists() or (run_dir / METRICS).exists()
    if not (config.is_file() and began):
        # Nothing, or a run that failed before its first step.
        _clear(run_dir)
    else:
        kind = "completed run" if completed else "run"
        way_out = "name another directory with hydra.run.dir=…, or remove this one"
        if resolved.config.resume == "never" or resolved.config.task != "fit":
            raise ConfigError(f"{run_dir} already holds a {kind}: {way_out}")
        allowed = PRESENTATION if completed else MAY_CHANGE
        stored = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(config)))
        found = [c for c in changes(stored, resolved.plain) if c.key not in allowed]
        if found:
            raise ConfigError(
                f"{run_dir} already holds a {kind} of another configuration "
                f"({'; '.join(map(str, found))}): {way_out}"
            )
        if completed:
            return False
        if checkpoint.exists():
            for name in (RESULTS, TRACEBACK):
                (run_dir / name).unlink(missing_ok=True)
        else:
            _clear(run_dir)
    config.write_text(resolved.text, encoding="utf-8")
    return True


def _clear(run_dir: Path) -> None:
    """Remove what an attempt without a checkpoint left behind: it begins again."""
    from equiloss.records.run_dir import EVALUATION, METRICS, RESULTS

    for name in (METRICS, RESULTS, EVALUATION, TRACEBACK, TRACKERS):
        (run_dir / name).unlink(missing_ok=True)
    for events in run_dir.glob("events.out.tfevents.*"):
        events.unlink()
    for folder in ("checkpoints", "ranks"):
        shutil.rmtree(run_dir / folder, ignore_errors=True)


@contextmanager
def hold(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes off a directory while the context lasts.

    Args:
        directory: A run's, or a sweep's.
        wait: Wait for the process that holds it, instead of raising.

    Raises:
        ConfigError: if another process holds it, naming the holder.
    """
    # A record lock belongs to this process alone: it ends with it, however it ends, and forked
    # loader workers that outlive it do not hold it.
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"{directory} is in use by {file.read() or 'another process'}: name another "
                "directory, or wait with in_use=wait"
            ) from error
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


class _Unset:
    def __repr__(self) -> str:
        return "not set"


_UNSET = _Unset()


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, _Unset) else json.dumps(value)
