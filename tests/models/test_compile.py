"""`model.compile=true`, end to end: ranks, a short last batch, micro-batches and a resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from equiloss.records.results import Result, read_metrics
from processes import until_it_trains
from support import ROOT, Train, slow

EAGER = (
    *("trainer.precision=64-true", "data.max_samples=110", "data.batch_size=40"),  # 40, 40, 30
    *("trainer.max_epochs=3", "callbacks=quiet", "logger=csv", "parity.every_n_steps=4"),
)
COMPILED = (*EAGER, "model.compile=true")
NETWORKS = {
    "convnet": ("model.options.widths=[8,16]",),
    "mlp": ("model=mlp", "model.options.widths=[16,16]", "model.options.dropout=0.2"),
}


def losses(run: Path) -> list[float]:
    result = Result.read(run)
    assert result.status == "completed"
    assert result.parity["agree"]
    return [value for name in ("train/loss", "val/loss") for value in read_metrics(run, name)]


@slow
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_same_run_on_any_split(network: str, train: Train, tmp_path: Path) -> None:
    def done(name: str, *words: str) -> list[float]:
        given = (*NETWORKS[network], *words, f"hydra.run.dir={tmp_path}/{name}")
        ended = train(*given, timeout=600)
        assert ended.returncode == 0, ended.stderr
        return losses(tmp_path / name)

    eager = pytest.approx(done("eager", *EAGER), rel=1e-11)  # fused kernels round otherwise
    assert done("compiled", *COMPILED) == eager
    assert done("micro", *COMPILED, "trainer.micro_batch_size=7") == eager
    assert done("ranks", *COMPILED, "trainer=ddp_cpu", "trainer.devices=2") == eager


@slow
def test_a_compiled_run_that_was_killed_goes_on(train: Train, tmp_path: Path) -> None:
    long = (*COMPILED, *NETWORKS["mlp"], "trainer.max_epochs=40", "checkpoint.every_n_steps=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(*long, f"hydra.run.dir={whole}", timeout=600).returncode == 0
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *long, f"hydra.run.dir={cut}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    until_it_trains(process, cut)
    process.kill()
    process.communicate()
    assert not (cut / "results.json").exists()
    assert train(*long, f"hydra.run.dir={cut}", timeout=600).returncode == 0
    assert len(Result.read(cut).segments) == 2
    assert losses(cut) == losses(whole)
