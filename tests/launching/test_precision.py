"""`trainer.precision=auto`: decided by the device, stored, and kept wherever the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equiloss.config import PRECISIONS
from equiloss.errors import RecordError
from equiloss.launching import precision
from equiloss.launching.precision import bfloat16_over_float32, settled
from equiloss.records.reading import read_yaml
from equiloss.records.results import Result
from support import Train, composed


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a device measures, one after the other."""
    ratios: list[float] = []
    monkeypatch.setattr(precision, "bfloat16_over_float32", lambda device: ratios.pop(0))
    return ratios


@pytest.mark.parametrize(
    ("measured", "chosen"), [(0.1, "bf16-mixed"), (0.7, "bf16-mixed"), (0.9, "32-true")]
)
def test_it_is_what_the_device_is_fast_in(measured, chosen, ratio, tmp_path, capsys):
    ratio.append(measured)
    auto = composed("trainer.precision=auto")
    resolved = settled(auto, tmp_path)
    assert resolved.config.trainer.precision == resolved.plain["trainer"]["precision"] == chosen
    assert resolved.hash == composed(f"trainer.precision={chosen}").hash
    said = f"trainer.precision=auto: {chosen} (bfloat16 takes {measured:.2f} of float32's time on"
    assert capsys.readouterr().out.startswith(said)


def test_a_run_keeps_what_it_began_with(ratio, tmp_path, capsys):
    begun = composed("trainer.precision=bf16-mixed")
    (tmp_path / "config.yaml").write_text(begun.text)
    assert settled(composed("trainer.precision=auto"), tmp_path).hash == begun.hash
    assert capsys.readouterr().out == "trainer.precision=auto: bf16-mixed (as this run began)\n"
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RecordError):
        settled(composed("trainer.precision=auto"), tmp_path)


def test_without_auto_nothing_is_measured(ratio, tmp_path):
    resolved = composed("trainer.precision=64-true")
    assert settled(resolved, tmp_path) is resolved


def test_a_device_is_measured():
    assert 0.001 < bfloat16_over_float32("cpu") < 1000


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured():
    assert 0.001 < bfloat16_over_float32("cuda") < 1000
