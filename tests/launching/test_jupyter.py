"""A notebook that composes, trains in one process and in two, and predicts, as Jupyter does it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import slow

pytestmark = slow

CELLS = (
    "import signal\n"
    "before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]\n"
    "from equiloss import compose, fit, load",
    'config = compose("loss=focal", "model=mlp", "trainer.max_epochs=2")\n'
    'done = fit(config, "one")\n'
    'print("accuracy", done.metrics["test/acc"] > 0.8)',
    'words = ("loss=focal", "model=mlp", "trainer.max_epochs=2", "trainer=ddp_cpu")\n'
    'two = fit(compose(*words, "trainer.devices=2"), "two")\n'
    'print("ranks", two.result.world_size)',
    "import torch\n"
    "model = load(done)\n"
    "images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)\n"
    'print("labels", len(model.predict(images).labels))',
    "after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]\n"
    'print("handlers", after == before)',
    'compose("loss=focla")',
)


def test_three_lines_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With it the kernel would not show what other processes print.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    nbformat = pytest.importorskip("nbformat", reason="comes with the extra oracles")
    nbclient = pytest.importorskip("nbclient", reason="comes with the extra oracles")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        book, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    *ran, refused = book.cells
    said = []
    for cell in ran:
        assert all(output.output_type != "error" for output in cell.outputs), cell.outputs
        # The summary of the network is displayed, and no stream.
        streams = (output for output in cell.outputs if output.output_type == "stream")
        said.append("".join(output.text for output in streams if output.name == "stdout"))
    displayed = [
        output.data["text/plain"]
        for output in ran[1].outputs
        if output.output_type == "display_data"
    ]
    training, testing = (text for text in displayed if "left" in text)
    assert re.match(r"epoch 2/2 ━+ 46/46 steps .* val/loss 0\.\d+  val/acc 0\.\d+$", training)
    assert re.match(r"testing ━+ 1/1 batches", testing)
    assert said[1].endswith("accuracy True\n")
    assert "epoch 2/2: train/loss" in said[2]  # a rank of its own prints lines
    assert said[2].endswith("ranks 2\n")
    assert said[3] == "labels 3\n"
    assert said[4] == "handlers True\n"
    assert (tmp_path / "two" / "results.json").is_file()
    (error,) = (output for output in refused.outputs if output.output_type == "error")
    assert "unknown loss 'focla'. Did you mean 'focal'?" in error.evalue
