"""What Weights & Biases and MLflow are told of a run.

Tests marked `loggers` write to both, offline, and read back what was written (make loggers).
"""

from __future__ import annotations

import csv
import json
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equiloss.config import MlflowConfig, WandbConfig
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import ConfigError
from equiloss.records import trackers
from equiloss.records.results import Result, read_metrics
from equiloss.records.run_dir import CONFIG, LEDGER, METRICS, sweep_of
from equiloss.records.trackers import tracked
from support import QUIET, Run, Train, composed

loggers = pytest.mark.loggers

BOTH = "logger=[wandb,mlflow]"
OFFLINE = (BOTH, "logger.wandb.mode=offline")
SHORT = (*OFFLINE, "callbacks=quiet", "debug=fast", "parity.every_n_steps=2")
FAST = (*QUIET, *SHORT)
VARIABLES = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}

# A logged value, with its step and name.
Value = tuple[int, str, float]


@pytest.mark.parametrize(
    ("choice", "enabled"),
    [
        ("csv", {"tensorboard": False, "wandb": False, "mlflow": False}),
        ("tensorboard", {"tensorboard": True, "wandb": False, "mlflow": False}),
        ("wandb", {"tensorboard": True, "wandb": True, "mlflow": False}),
        ("mlflow", {"tensorboard": True, "wandb": False, "mlflow": True}),
        ("[csv,wandb,mlflow]", {"tensorboard": False, "wandb": True, "mlflow": True}),
    ],
)
def test_what_a_choice_turns_on(choice: str, enabled: dict[str, bool]) -> None:
    config = composed(f"logger={choice}").config.logger
    services = {"wandb": config.wandb.enabled, "mlflow": config.mlflow.enabled}
    assert {"tensorboard": config.tensorboard, **services} == enabled


def test_a_password_is_not_stored() -> None:
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD"):
        MlflowConfig(tracking_uri="https://me:secret@example.org")


def test_an_unknown_mode() -> None:
    with pytest.raises(ConfigError, match=r"unknown logger\.wandb\.mode 'ofline'.*'offline'"):
        WandbConfig(mode="ofline")


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed(
    package: str, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"not installed: pip install {package}$"):
        run_here("debug=fast", f"logger=[csv,{package}]")
    # Nothing was trained for nothing.
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_ranks_have_no_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WandbRun", None)
    monkeypatch.setattr(trackers, "MlflowRun", None)
    trainer: Any = SimpleNamespace(is_global_zero=False, loggers=["metrics.csv"])
    with tracked(trainer, composed(BOTH), tmp_path, continued=False):
        assert trainer.loggers == ["metrics.csv"]


class Tracker:
    """Stands for a tracker, and remembers how its run ended."""

    def __init__(self, resolved: Any, run_dir: Path, run_id: str | None) -> None:
        self.version = run_id or "new"
        self.ended: tuple[str, dict[str, float]] | None = None

    def close(self, status: str, final: dict[str, float]) -> None:
        self.ended = status, dict(final)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "completed"),
        (ValueError, "failed"),
        (Interrupted("SIGTERM", 143), "interrupted"),
        (SystemExit, "failed"),
    ],
)
def test_trackers_learn_how_a_run_ended(
    error: BaseException | type[BaseException] | None,
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "WandbRun", Tracker)
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[])

    def follow() -> None:
        with tracked(trainer, composed("logger=wandb"), tmp_path, continued=False) as final:
            final["test/acc"] = 0.5
            if error is not None:
                raise error

    if error is None:
        follow()
    else:
        with pytest.raises(error if isinstance(error, type) else type(error)):
            follow()
    (tracker,) = trainer.loggers
    assert tracker.ended == (status, {"test/acc": 0.5})


def test_a_tracker_is_closed_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class First(Tracker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(self)

    monkeypatch.setattr(trackers, "WandbRun", First)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[])
    with (
        pytest.raises(ConfigError, match="pip install mlflow"),
        tracked(trainer, composed(BOTH), tmp_path, continued=False),
    ):
        pass
    assert [tracker.ended for tracker in opened] == [("failed", {})]


@pytest.mark.parametrize(("continued", "expected"), [(True, "mine"), (False, "new")])
def test_a_run_that_continues_keeps_its_name(
    continued: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "WandbRun", Tracker)
    (tmp_path / trackers.TRACKERS).write_text('{"wandb": "mine", "mlflow": "other"}')
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[])
    with tracked(trainer, composed("logger=wandb"), tmp_path, continued=continued):
        assert trainer.loggers[0].version == expected
    assert json.loads((tmp_path / trackers.TRACKERS).read_text())["wandb"] == expected


def test_a_run_knows_its_sweep(tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep" / "losses" / "run"
    run_dir.mkdir(parents=True)
    assert sweep_of(run_dir) is None
    (tmp_path / "sweep" / LEDGER).touch()
    assert sweep_of(run_dir) == tmp_path / "sweep"


def metrics_of(run_dir: Path) -> set[Value]:
    with (run_dir / METRICS).open(newline="") as file:
        return {
            (int(row["step"]), name, float(text))
            for row in csv.DictReader(file)
            for name, text in row.items()
            if text and name != "step"
        }


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B wrote: a log of LevelDB's form with a header of its own, holding protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, struct.Struct("<IHB")  # checksum, length, kind
    content = file.read_bytes()
    assert content.startswith(b":W&B")
    position, parts = 7, []
    while position + header.size <= len(content):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(content, position)
        position += header.size
        parts.append(content[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


class Wandb:
    """An attempt at a run, as W&B has it."""

    def __init__(self, file: Path) -> None:
        records = list(wandb_records(file))
        (self.run,) = (record.run for record in records if record.HasField("run"))
        self.exit_codes = [record.exit.exit_code for record in records if record.HasField("exit")]
        self.values: set[Value] = set()
        self.summary: dict[str, Any] = {}
        for record in records:
            if record.HasField("history"):
                row = {
                    item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
                }
                step = row.pop("trainer/global_step")
                self.values |= {(step, name, row[name]) for name in row if name[0] != "_"}
            for item in record.summary.update:
                self.summary[item.key or item.nested_key[0]] = json.loads(item.value_json)


def wandb_attempts(run_dir: Path) -> list[Wandb]:
    return [Wandb(file) for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]


class Mlflow:
    """What MLflow has of a run."""

    def __init__(self, run_dir: Path, store: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns of itself as it is imported
            from mlflow import MlflowClient

            client = MlflowClient(f"sqlite:///{store}/mlflow.db")
        (experiment,) = client.search_experiments(filter_string="name != 'Default'")
        self.experiment = experiment.name
        self.runs = len(client.search_runs([experiment.experiment_id]))
        run = client.get_run(json.loads((run_dir / trackers.TRACKERS).read_text())["mlflow"])
        self.status, self.name = run.info.status, run.info.run_name
        self.params, self.tags = run.data.params, run.data.tags
        self.final = {
            name.removeprefix("final/"): value
            for name, value in run.data.metrics.items()
            if name.startswith("final/")
        }
        self.values: set[Value] = {
            (point.step, name, point.value)
            for name in run.data.metrics
            if not name.startswith("final/")
            for point in client.get_metric_history(run.info.run_id, name)
        }


@pytest.fixture
def train_offline(train: Train, monkeypatch: pytest.MonkeyPatch) -> Train:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package, reason=f"pip install {package}")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return train


@loggers
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_is_written_as_metrics_csv_has_it(
    devices: int, train_offline: Train, tmp_path: Path
) -> None:
    # A directory as people name it.
    run_dir = tmp_path / "my run"
    options = ("loss=softmax_nll", "seed=3", f"trainer.devices={devices}")
    # The weights that are tested are those of the first epoch: its metrics are the final ones.
    first = ("trainer.max_epochs=2", "optimizer.lr=20")
    done = train_offline(*FAST, *options, *first, f"hydra.run.dir='{run_dir}'")
    assert done.returncode == 0, done.stderr
    result, expected = Result.read(run_dir), metrics_of(run_dir)
    assert result.world_size == devices
    assert {"train/loss", "val/nll", "test/acc", "parity/max_ratio"} <= {n for _, n, _ in expected}
    evaluated = {n: v for n, v in result.metrics.items() if n.startswith(("val/", "test/"))}
    assert evaluated["val/nll"] == read_metrics(run_dir, "val/nll")[0]

    (wandb,) = wandb_attempts(run_dir)
    assert wandb.values == expected
    assert result.metrics.items() <= wandb.summary.items()
    assert wandb.exit_codes == [0]
    assert (wandb.run.project, wandb.run.display_name) == ("equiloss", "softmax_nll-s3")
    assert wandb.run.run_group == ""
    settings = {item.key: json.loads(item.value_json) for item in wandb.run.config.update}
    assert settings["loss"]["name"] == "softmax_nll"
    assert "logger" not in settings

    mlflow = Mlflow(run_dir, run_dir)
    assert mlflow.values == expected
    assert mlflow.final == evaluated
    assert (mlflow.runs, mlflow.status) == (1, "FINISHED")
    assert (mlflow.experiment, mlflow.name) == ("equiloss", "softmax_nll-s3")
    assert mlflow.params["loss.name"] == "softmax_nll"
    assert mlflow.params["optimizer.lr"] == str(composed("debug=fast").config.optimizer.lr)


@loggers
@pytest.mark.parametrize(
    ("devices", "target"), [(1, "raises_in_training"), (2, "raises_in_training"), (2, "killed")]
)
def test_a_run_that_continues_here_continues_there(
    devices: int, target: str, train_offline: Train, tmp_path: Path
) -> None:
    run_dir, mended = tmp_path / "run", tmp_path / "mended"
    command = (
        *(*OFFLINE, "callbacks=quiet", "model=custom", f"model.target=stand_ins:{target}"),
        *(f"model.options={{rank: 0, unless: {mended}}}", "checkpoint.every_n_steps=3"),
        *("trainer.max_steps=12", f"trainer.devices={devices}", f"hydra.run.dir={run_dir}"),
    )
    # What the stand-in goes by; a process that starts no ranks has none.
    alone = {"LOCAL_RANK": "0"} if devices == 1 else {}
    assert train_offline(*command, **alone).returncode == 1
    # A rank that was killed cannot say so: its supervisor does.
    assert Mlflow(run_dir, run_dir).status == "FAILED"
    mended.touch()
    done = train_offline(*command)
    assert done.returncode == 0, done.stderr
    segments = [segment["from_step"] for segment in Result.read(run_dir).segments]
    assert segments == [0, 3]

    expected = metrics_of(run_dir)
    mlflow = Mlflow(run_dir, run_dir)
    assert (mlflow.runs, mlflow.status) == (1, "FINISHED")
    assert mlflow.values >= expected
    # The step after the checkpoint is there twice, the same to the bit.
    assert timeless(mlflow.values) == timeless(expected)
    if target == "killed":
        return  # W&B had written nothing yet: it does every 15 s
    first, second = wandb_attempts(run_dir)
    assert first.run.run_id == second.run.run_id
    assert (first.exit_codes, second.exit_codes) == ([1], [0])
    assert first.values | second.values >= expected
    assert timeless(first.values | second.values) == timeless(expected)


def timeless(values: set[Value]) -> set[Value]:
    return {value for value in values if value[1] != "train/samples_per_s"}


@loggers
def test_jobs_of_a_sweep_at_the_same_time(train_offline: Train, tmp_path: Path) -> None:
    sweep_dir = tmp_path / "mine"
    command = ("-m", *FAST, "seed=0,1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4")
    done = train_offline(*command, f"hydra.sweep.dir={sweep_dir}", timeout=300)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in sweep_dir.glob("*/results.json"))
    assert len(runs) == 4
    for seed, run_dir in enumerate(runs):
        (wandb,) = wandb_attempts(run_dir)
        mlflow = Mlflow(run_dir, sweep_dir)
        assert wandb.values == mlflow.values == metrics_of(run_dir)
        assert wandb.run.display_name == mlflow.name == f"cross_entropy-s{seed}"
        assert wandb.run.run_group == mlflow.tags["sweep"] == "mine"
        assert (mlflow.runs, mlflow.status) == (4, "FINISHED")


@loggers
def test_jobs_of_a_sweep_after_each_other(train_offline: Train, tmp_path: Path) -> None:
    # In one process. The first one fails, and must not take the second one's values.
    sweep_dir = tmp_path / "mine"
    command = ("-m", *SHORT, "model=custom", "model.target=stand_ins:growing")
    swept = ("model.options={gap: 1000.0, at: 2}", "loss=softmax_nll,cross_entropy")
    done = train_offline(*command, *swept, f"hydra.sweep.dir={sweep_dir}")
    assert done.returncode == 1
    second, first = sorted(path.parent for path in sweep_dir.glob("*/results.json"))
    for run_dir, status, exit_code in ((first, "FAILED", 1), (second, "FINISHED", 0)):
        (wandb,) = wandb_attempts(run_dir)
        mlflow = Mlflow(run_dir, sweep_dir)
        assert wandb.values == mlflow.values == metrics_of(run_dir)
        assert (wandb.exit_codes, mlflow.status) == ([exit_code], status)


@loggers
def test_a_client_without_a_database(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(ConfigError, match="needs alembic, which is not installed"):
        run_here("debug=fast", "logger=[csv,mlflow]")


@loggers
def test_no_key_is_stored(train_offline: Train, tmp_path: Path) -> None:
    run_dir, secret = tmp_path / "run", "s3cret" * 7
    done = train_offline(*FAST, f"hydra.run.dir={run_dir}", WANDB_API_KEY=secret)
    assert done.returncode == 0, done.stderr
    assert secret not in (run_dir / CONFIG).read_text()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]


@loggers
def test_a_server_that_is_not_there(train_offline: Train, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    server = {"MLFLOW_TRACKING_URI": "http://me:s3cret@127.0.0.1:9"}
    command = (*QUIET, "logger=mlflow", "debug=fast", f"hydra.run.dir={run_dir}")
    done = train_offline(*command, **server, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    assert done.returncode == 1
    assert "error: logger=mlflow: API request to http://127.0.0.1:9/" in done.stderr
    assert "Traceback" not in done.stderr
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert not (run_dir / "checkpoints").exists()


@loggers
def test_without_an_account(train_offline: Train, tmp_path: Path) -> None:
    options = ("logger=wandb", "logger.wandb.mode=online", f"hydra.run.dir={tmp_path}/run")
    done = train_offline(*QUIET, *options, "debug=fast", HOME=str(tmp_path), WANDB_API_KEY="")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "wandb login" in line
    assert "logger.wandb.mode=offline" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
