"""A network's heads are known alike to what is frozen and to the weights that a fit starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from equiloss.config import ModelConfig
from equiloss.models import weights
from equiloss.models.build import build_network
from equiloss.models.dropout import RowKeys
from support import Run

# Networks of timm whose logits are made by two layers.
TWO = {
    "levit_128s": ("head.linear", "head_dist.linear"),
    "crossvit_9_240": ("head.0", "head.1"),
    "repvit_m0_9": ("head.head.l", "head.head_dist.l"),
    "volo_d1_224": ("head", "aux_head"),
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
}
DEIT = {"img_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 2}


def made(config: ModelConfig, classes: int) -> nn.Module:
    shape = (3, 16, 16)
    return build_network(config, num_classes=classes, image_shape=shape, row_keys=RowKeys(0))


@pytest.mark.parametrize("name", TWO)
def test_of_two_heads_both_learn(name: str) -> None:
    with torch.device("meta"):
        model = made(ModelConfig(name=name, library="timm", freeze="backbone"), 7)
    learning = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{path}.{kind}" for path in TWO[name] for kind in ("weight", "bias")}


def test_of_two_heads_both_are_new(tmp_path: Path) -> None:
    config = ModelConfig(name=[*TWO][-1], library="timm", options=DEIT)
    torch.save(made(config, 9).state_dict(), tmp_path / "w.pth")
    config.weights = str(tmp_path / "w.pth")
    said = weights.give(made(config, 7), config, 7)
    new = "head.weight, head.bias, head_dist.weight, head_dist.bias"
    assert said.endswith(f"; the head is new ({new})")


def test_a_fit_starts_from_a_run_whose_two_heads_are_for_other_classes(
    run_here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = str(DEIT).replace("'", "")  # Hydra's grammar has no names in quotes
    words = (
        *("data=synthetic", "trainer.max_steps=1", "~model.options.widths"),
        *("model=timm", f"model.name={[*TWO][-1]}", f"model.options={options}"),
    )
    sizes = "data.options={{channels: 3, size: 16, num_classes: {}}}"
    run_here(*words, sizes.format(3), directory=tmp_path / "first")
    caplog.set_level("INFO")
    last = f"init_from={tmp_path}/first/checkpoints/last.ckpt"
    run_here(*words, sizes.format(4), last, directory=tmp_path / "second")
    (said,) = [line for line in caplog.messages if line.startswith("starting with ")]
    assert "; the head is new (head.weight, head.bias, head_dist.weight, head_dist.bias)" in said
