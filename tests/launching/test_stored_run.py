"""`task=test run=DIR`: a run's own configuration is what it is evaluated by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from equiloss.config.resolved import resolve
from equiloss.errors import UserError
from equiloss.launching.stored_run import of_run, user_paths
from equiloss.records.results import Result
from support import Train, composed, composed_with_hydra

TRAINED = ("model=mlp", "model.options.widths=[16]", "data.batch_size=40", "loss=focal")


def asked(*overrides: str) -> DictConfig:
    """What the command would be given."""
    config = composed_with_hydra(*overrides)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return of_run(config, overrides)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(composed(*TRAINED).text)
    return tmp_path


def test_nothing_is_retyped(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*TRAINED, "debug=fast", "callbacks=quiet", f"hydra.run.dir={run}").returncode == 0
    done = train(
        "task=test", "run=run", "trainer.micro_batch_size=7", f"hydra.run.dir={tmp_path}/t"
    )
    assert done.returncode == 0, done.stderr
    trained, tested = Result.read(run).metrics, Result.read(tmp_path / "t").metrics
    assert tested == {
        name: pytest.approx(value, rel=1e-6)
        for name, value in trained.items()
        if name.startswith("test/")
    }


def test_what_the_command_says_comes_over_it(stored: Path) -> None:
    words = ("task=validate", f"run={stored}", "trainer=ddp_cpu", "data.batch_size=30")
    config = resolve(asked(*words)).config
    assert (config.task, config.run) == ("validate", None)
    assert config.ckpt_path == f"{stored}/checkpoints/best.ckpt"
    assert config.loss["name"] == "focal"
    assert config.model.options["widths"] == [16]
    assert (config.trainer.devices, config.data.batch_size) == (2, 30)


def test_paths_count_from_where_the_user_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = asked("data.table='~/a.csv'", "data.root='~/pictures'", "init_from=weights.ckpt")
    user_paths(config)
    assert (config.data.table, config.data.root) == ("/home/ada/a.csv", "/home/ada/pictures")
    assert config.init_from == "weights.ckpt"  # as it was written
    for given, found in {"~/w.pth": "/home/ada/w.pth", "DEFAULT": "DEFAULT"}.items():
        config = asked("model=torchvision", f"model.weights='{given}'")
        user_paths(config)
        assert config.model.weights == found


def test_the_weights_are_those_that_the_run_tested(stored: Path) -> None:
    (stored / "config.yaml").write_text(composed(*TRAINED, "test_weights=last").text)
    assert asked("task=test", f"run={stored}").ckpt_path == f"{stored}/checkpoints/last.ckpt"
    asked_for = asked("task=test", f"run={stored}", "ckpt_path=other.ckpt")
    assert asked_for.ckpt_path == "other.ckpt"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run={0}",), "run={0} is evaluated, by task=test or task=validate"),
        (("task=test", "run={0}/none"), "{0}/none is no run's directory, which has a config.yaml"),
        (("task=test", "run={0}", "debug=fast"), "debug goes not with run=…"),
    ],
)
def test_what_it_is_refused_with(words: tuple[str, ...], said: str, stored: Path) -> None:
    with pytest.raises(UserError) as refused:
        asked(*(word.format(stored) for word in words))
    assert said.format(stored) in str(refused.value)


def test_a_run_that_has_not_completed_is_said_to_be_none(stored: Path, caplog: Any) -> None:
    asked("task=test", f"run={stored}")
    assert f"run={stored} has not completed: its weights so far are evaluated" in caplog.text


def test_a_strangers_directory_names_no_code(stored: Path) -> None:
    code = ("model=custom", "model.target=os:system")
    (stored / "config.yaml").write_text(composed(*TRAINED[2:], *code).text)
    words = ("task=test", f"run={stored}")
    with pytest.raises(UserError, match=r"names code to run: if you trust it, add model\.target="):
        asked(*words)
    assert asked(*words, *code).model.target == "os:system"


def test_a_strangers_run_logs_nowhere(stored: Path) -> None:
    (stored / "config.yaml").write_text(
        composed(*TRAINED, "logger=wandb", "data.download=true").text
    )
    config = resolve(asked("task=test", f"run={stored}")).config
    assert not config.logger.wandb.enabled
    assert not config.data.download


def test_a_file_that_is_no_configuration_is_named(stored: Path) -> None:
    (stored / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml is no configuration of a run"):
        asked("task=test", f"run={stored}")
