"""`trainer.precision=auto`: decided by the device, stored, and kept wherever the run goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equiloss.config import PRECISIONS
from equiloss.distributed import membership
from equiloss.errors import ConfigError, RecordError
from equiloss.launching import precision
from equiloss.launching.precision import bfloat16_over_float32, measure, settled
from equiloss.records.reading import read_yaml
from equiloss.records.results import Result
from support import Train, composed, slow


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have a device be so fast in bfloat16."""
    return lambda ratio: monkeypatch.setenv(precision.MEASURED, f"cpu cpu {ratio}")


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.1, "bf16-mixed"), (0.7, "bf16-mixed"), (0.9, "32-true")]
)
def test_it_is_what_the_device_is_fast_in(ratio, chosen, measured, tmp_path, capsys):
    measured(ratio)
    resolved = settled(composed("trainer.precision=auto"), tmp_path)
    assert resolved.config.trainer.precision == resolved.plain["trainer"]["precision"] == chosen
    assert resolved.hash == composed(f"trainer.precision={chosen}").hash
    said = f"trainer.precision=auto: {chosen} (bfloat16 takes {ratio:.2f} of float32's time on cpu)"
    assert capsys.readouterr().out == f"{said}\n"


def test_a_run_keeps_what_it_began_with(measured, tmp_path, capsys):
    measured(0.1)
    auto, begun = composed("trainer.precision=auto"), composed("trainer.precision=64-true")
    (tmp_path / "config.yaml").write_text(begun.text)
    # It failed before its first step: nothing goes on.
    assert settled(auto, tmp_path).config.trainer.precision == "bf16-mixed"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")
    capsys.readouterr()
    assert settled(auto, tmp_path).hash == begun.hash
    assert capsys.readouterr().out == "trainer.precision=auto: 64-true (as this run began)\n"
    for other in ("auto", "5"):
        (tmp_path / "config.yaml").write_text(begun.text.replace("64-true", other))
        assert settled(auto, tmp_path).config.trainer.precision == "bf16-mixed"
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RecordError):
        settled(auto, tmp_path)


def test_only_the_first_rank_decides(measured, monkeypatch, tmp_path):
    other = membership.Membership("torchrun", 1, 2, 1, 2)
    monkeypatch.setattr(membership, "external", lambda: other)
    monkeypatch.setattr(membership, "from_first_rank", lambda mine: mine or ("64-true", "so"))
    (tmp_path / "config.yaml").write_text("a: [")  # of another program, where this rank stands
    auto = composed("trainer.precision=auto")
    assert settled(auto, tmp_path).config.trainer.precision == "64-true"


def test_without_auto_nothing_is_measured(tmp_path):
    resolved = composed("trainer.precision=64-true")
    assert settled(resolved, tmp_path) is resolved


def test_a_device_is_measured_once_in_a_process_that_ends(monkeypatch):
    monkeypatch.delenv(precision.MEASURED, raising=False)
    first = measure("cpu")
    assert (first.accelerator, first.device) == ("cpu", "cpu")
    # One that has no instructions for it is slower, one that has them faster, and none alike.
    assert first.ratio > 0
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("measured again"))
    assert measure("cpu") == first


def test_a_device_that_cannot_be_measured_is_named(monkeypatch):
    monkeypatch.delenv(precision.MEASURED, raising=False)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ConfigError, match=r"accelerator=gpu cannot be measured; name one of 64-"):
        measure("gpu")


def test_both_types_are_timed_on_the_device(monkeypatch):
    made = []
    ones = torch.ones

    def watched(*size, dtype, device):
        made.append((dtype, device))
        return ones(*size, dtype=dtype, device="cpu")

    monkeypatch.setattr(torch, "ones", watched)
    monkeypatch.setitem(precision.ROWS, "else", 8)
    assert bfloat16_over_float32("gpu0") > 0
    assert made == [(torch.bfloat16, "gpu0"), (torch.float32, "gpu0")]


def test_of_a_run_it_is_stored_and_goes_on(train: Train, tmp_path: Path):
    words = ("debug=fast", "callbacks=quiet", "logger=csv", f"hydra.run.dir={tmp_path}/run")
    done = train(*words, "trainer.precision=auto")
    assert done.returncode == 0, done.stderr
    stored = read_yaml(tmp_path / "run" / "config.yaml")["trainer"]["precision"]
    assert stored in PRECISIONS
    assert f"trainer.precision=auto: {stored} (bfloat16 takes" in done.stdout
    before = Result.read(tmp_path / "run")
    again = train(*words, "trainer.precision=auto")
    assert again.returncode == 0, again.stderr
    assert "(as this run began)" in again.stdout
    assert "completed already" in again.stdout
    assert Result.read(tmp_path / "run") == before


@slow
def test_a_sweep_measures_once(train: Train, tmp_path: Path):
    words = ("debug=fast", "callbacks=quiet", "logger=csv", f"hydra.sweep.dir={tmp_path}/sweep")
    given = ("trainer.precision=auto", "sweep.parallel=2", "seed=0,1")
    done = train("-m", *given, *words, timeout=240)
    assert done.returncode == 0, done.stderr
    said = [line[3:] for line in done.stdout.splitlines() if "trainer.precision=auto" in line]
    assert len([line for line in said if line.startswith("trainer")]) == 2
    assert len({line for line in said if line.startswith("trainer")}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(monkeypatch):
    monkeypatch.delenv(precision.MEASURED, raising=False)
    assert measure("gpu").device.startswith("cuda")
