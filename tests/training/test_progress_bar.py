"""What Jupyter displays of a run under way."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich import get_console

from equiloss.training import progress_bar
from equiloss.training.progress_bar import NotebookProgress


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each text that an output was written anew with, without IPython."""
    texts: list[str] = []

    def update(bundle: dict[str, str], *, raw: bool) -> None:
        texts.append(bundle["text/plain"])

    ipython: Any = ModuleType("IPython")
    ipython.display = SimpleNamespace(display=lambda *_, **__: SimpleNamespace(update=update))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(get_console(), "_width", 80)  # as narrow as Rich takes a notebook for
    return texts


def trainer(**more: Any) -> Any:
    return SimpleNamespace(is_global_zero=True, max_epochs=2, current_epoch=1, **more)


def test_all_values_have_room(shown: list[str]) -> None:
    scalars = {"train/loss": 0.5, "val/loss": 0.25, "val/acc": 0.125}
    progress = SimpleNamespace(scalars=scalars)
    classifier: Any = SimpleNamespace(total_steps=46, global_step=46, progress=progress)
    bar = NotebookProgress()
    bar.on_train_start(trainer(), classifier)
    bar.on_train_epoch_end(trainer(), classifier)
    bar.teardown(trainer(), classifier, "fit")
    assert shown[-1].endswith("train/loss 0.5000  val/loss 0.2500  val/acc 0.1250")
    assert shown[-1].startswith("epoch 2/2 ━")
    assert "46/46 steps" in shown[-1]


@pytest.mark.parametrize(("interval", "texts"), [(-1.0, 6), (1e9, 2)])
def test_testing_is_shown_batch_by_batch_but_not_too_often(
    shown: list[str], monkeypatch: pytest.MonkeyPatch, interval: float, texts: int
) -> None:
    monkeypatch.setattr(progress_bar, "INTERVAL", interval)
    bar = NotebookProgress()
    bar.on_test_start(trainer(num_test_batches=[4]), SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(4):
        bar.on_test_batch_end()
    bar.teardown(trainer(), SimpleNamespace(), "test")  # type: ignore[arg-type]
    assert len(shown) == texts  # with the first and the last
    assert "0/4 batches" in shown[0]
    assert "4/4 batches" in shown[-1]
