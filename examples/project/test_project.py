"""The loss obeys the laws of a loss, and the experiment learns: `pytest`."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from my_loss import squared_hinge

from equiloss import load
from equiloss.testing import assert_loss_conforms

HERE = Path(__file__).parent


def test_the_loss_conforms():
    assert_loss_conforms(squared_hinge)


def test_the_experiment_learns(tmp_path):
    words = ["experiment=small", "callbacks=quiet", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([sys.executable, "train.py", *words], cwd=HERE, check=True)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["metrics"]["val/acc"] > 0.8
    model = load(tmp_path / "run", target="my_network:Small")
    assert model.predict(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).probabilities.shape == (2, 10)
