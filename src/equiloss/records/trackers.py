"""Trackers: Weights & Biases and MLflow follow a run, through Lightning's own loggers.

Only the first rank has them. The names by which they know the run are kept in `trackers.json` of
the run directory: a run that continues here continues there.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from equiloss.config import LoggerConfig
from equiloss.config.resolved import PRESENTATION, ResolvedConfig, leaves
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import ConfigError, RecordError
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import fits, read_json
from equiloss.records.run_dir import TRACKERS, sweep_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
# A run's status as an exit code, and as MLflow names it.
EXIT_CODES = {"completed": 0, "failed": 1, "interrupted": 130}
MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


@contextmanager
def tracked(
    trainer: Trainer, resolved: ResolvedConfig, run_dir: Path, *, continued: bool
) -> Iterator[dict[str, float]]:
    """Have the configured trackers follow a run while the context lasts.

    Args:
        trainer: Gets them as further loggers.
        resolved: The run's configuration.
        run_dir: The run's directory.
        continued: Whether the run goes on from a checkpoint, and the trackers' runs with it.

    Yields:
        An empty dictionary for the final value of every metric.

    Raises:
        ConfigError: if a package is not installed, or a tracker will not have the run.
    """
    config = resolved.config.logger
    final: dict[str, float] = {}
    if not trainer.is_global_zero:
        yield final
        return
    known = _known(run_dir) if continued else {}
    opened: dict[str, WandbRun | MlflowRun] = {}
    status = "failed"
    try:
        for name in ("wandb", "mlflow"):
            if getattr(config, name).enabled:
                opened[name] = _open(name, resolved, run_dir, known.get(name))
        ids = known | {name: tracker.version for name, tracker in opened.items()}
        if ids:
            write_atomically(run_dir / TRACKERS, json.dumps(ids) + "\n")
        else:
            (run_dir / TRACKERS).unlink(missing_ok=True)  # of an attempt that left nothing else
        trainer.loggers = [*trainer.loggers, *opened.values()]
        yield final
        status = "completed"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        for tracker in opened.values():
            tracker.close(status, final)


class WandbRun(WandbLogger):
    """A run of Weights & Biases, with its files in `wandb/` of the run directory.

    Args:
        resolved: The run's configuration.
        run_dir: The run's directory.
        run_id: The run to continue, if any.
    """

    def __init__(self, resolved: ResolvedConfig, run_dir: Path, run_id: str | None) -> None:
        import wandb

        config, sweep_dir = resolved.config.logger.wandb, sweep_of(run_dir)
        try:
            run = wandb.init(
                project=config.project or os.environ.get("WANDB_PROJECT", "equiloss"),
                entity=config.entity,
                name=config.name or _name(resolved),
                group=config.group or (sweep_dir.name if sweep_dir else None),
                mode=config.mode,
                dir=run_dir.absolute(),
                config=_computed(resolved),
                allow_val_change=True,  # of devices, say, where a run continues
                id=run_id,
                resume="allow",
                # Never two runs of a sweep in one.
                reinit="finish_previous",
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logger=wandb: {_first_line(error)} (without an account or a network: "
                "logger.wandb.mode=offline)"
            ) from error
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        # Made here: Lightning would set WANDB_MODE, for all later runs too.
        super().__init__(experiment=run)

    def close(self, status: str, final: Mapping[str, float]) -> None:
        """Put the final metrics into the summary, and finish."""
        self.experiment.summary.update(dict(final))
        self.experiment.finish(exit_code=EXIT_CODES[status])


class MlflowRun(MLFlowLogger):
    """A run of MLflow, by default in a store that the runs of a sweep share.

    Args:
        resolved: The run's configuration.
        run_dir: The run's directory.
        run_id: The run to continue, if any; where the store has none of that name, a new one.
    """

    def __init__(self, resolved: ResolvedConfig, run_dir: Path, run_id: str | None) -> None:
        from mlflow import MlflowClient, MlflowException

        config, sweep_dir = resolved.config.logger.mlflow, sweep_of(run_dir)
        uri = _tracking_uri(resolved.config.logger, run_dir)
        if uri.startswith(SQLITE):
            # mlflow-skinny comes without them, and would say that the address is unsupported.
            for package in ("sqlalchemy", "alembic"):
                import_module(package)
        experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "equiloss")
        try:
            with _alone(uri):
                client = MlflowClient(uri)
                _make_experiment(client, experiment, uri)
                continued = run_id is not None and _has(client, run_id)
                super().__init__(
                    experiment,
                    run_name=config.name or _name(resolved),
                    tracking_uri=uri,
                    tags={"sweep": sweep_dir.name} if sweep_dir else None,
                    run_id=run_id if continued else None,
                )
                if continued:
                    client.update_run(run_id, status="RUNNING")
                else:
                    # Once: MLflow refuses to change them.
                    self.log_hyperparams(dict(leaves(_computed(resolved))))
        except MlflowException as error:
            # Not from it: the traceback, which is stored, has the address with its password.
            raise ConfigError(f"logger=mlflow: {_first_line(error)}") from None

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Do nothing: the test after a fit goes on in the same run."""

    def close(self, status: str, final: Mapping[str, float]) -> None:
        """Log the final metrics, and set the run's final status."""
        evaluated = {n: v for n, v in final.items() if n.startswith(("val/", "test/"))}
        self.log_metrics({f"final/{name}": value for name, value in evaluated.items()})
        self.experiment.set_terminated(self.run_id, MLFLOW_STATUS[status])


def end_killed(config: LoggerConfig, run_dir: Path, status: str) -> None:
    """Set the final status in MLflow of a run that was killed and could not set it itself.

    Weights & Biases needs no such word: its server misses the run's heartbeat.

    Args:
        config: The run's loggers.
        run_dir: The run's directory.
        status: failed | interrupted.
    """
    if not config.mlflow.enabled:
        return
    try:
        from mlflow import MlflowClient, MlflowException
    except ModuleNotFoundError:
        return  # what ended the run, then
    # Nor may a damaged file hide what ended the run.
    with suppress(MlflowException, RecordError):
        run_id = _known(run_dir).get("mlflow")
        client = MlflowClient(_tracking_uri(config, run_dir))
        if run_id is not None and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, MLFLOW_STATUS[status])


def _known(run_dir: Path) -> dict[str, str]:
    """Read the trackers' ids of a run, as an earlier attempt left them in `trackers.json`.

    Raises:
        RecordError: if they cannot be read; without the file, each tracker gets a new run.
    """
    file = run_dir / TRACKERS
    known: dict[str, str] = read_json(file) if os.path.lexists(file) else {}
    if not fits(known, dict[str, str]):
        raise RecordError(file, "holds no names of a tracker's runs")
    return known


def _name(resolved: ResolvedConfig) -> str:
    return f"{resolved.config.loss['name']}-s{resolved.config.seed}"


def _computed(resolved: ResolvedConfig) -> dict[str, Any]:
    """The configuration's keys that a run is computed from: no presentation, no loggers."""
    hidden = PRESENTATION | {"logger"}
    return {key: value for key, value in resolved.plain.items() if key not in hidden}


def _open(
    name: str, resolved: ResolvedConfig, run_dir: Path, run_id: str | None
) -> WandbRun | MlflowRun:
    tracker = WandbRun if name == "wandb" else MlflowRun
    try:
        return tracker(resolved, run_dir, run_id)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"logger={name} needs {error.name}, which is not installed: pip install {name}"
        ) from error


def _first_line(error: Exception) -> str:
    """First line of an error's message, without the password that an address may hold."""
    return re.sub(r"://[^/@\s]*@", "://", str(error).strip().partition("\n")[0])


def _tracking_uri(config: LoggerConfig, run_dir: Path) -> str:
    uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"{SQLITE}{sweep_of(run_dir) or run_dir.absolute()}/mlflow.db"


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other processes off a database while MLflow makes its tables.

    Five processes that opened a new one together all failed, and left it broken (MLflow 3.17).
    """
    if not uri.startswith(SQLITE):
        yield
        return
    with Path(f"{uri.removeprefix(SQLITE)}.lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _make_experiment(client: MlflowClient, name: str, uri: str) -> None:
    """Make an experiment unless it is there; another job may do so at the same moment."""
    from mlflow import MlflowException

    # MLflow's own default is the current directory.
    database = Path(uri.removeprefix(SQLITE)).absolute()
    artifacts = (database.parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
    try:
        client.create_experiment(name, artifact_location=artifacts)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _has(client: MlflowClient, run_id: str) -> bool:
    from mlflow import MlflowException

    try:
        stage: str = client.get_run(run_id).info.lifecycle_stage
    except MlflowException:
        return False
    return stage == "active"
