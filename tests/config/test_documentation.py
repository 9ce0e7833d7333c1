"""`train.py --help`: every key, with what it means."""

from __future__ import annotations

from omegaconf import OmegaConf

from equiloss.config import Config
from equiloss.config.documentation import help_text
from equiloss.config.resolved import leaves
from support import Train


def test_every_key_has_a_meaning() -> None:
    lines = help_text().splitlines()
    schema = OmegaConf.to_container(OmegaConf.structured(Config))
    assert isinstance(schema, dict)
    keys = [key for key, value in leaves(schema) if value != {}]  # type: ignore[arg-type]
    assert len(keys) > 60
    for key in keys:
        (line,) = [line for line in lines if line.startswith((f"{key}=", f"{key}:"))]
        assert len(line.partition(": ")[2]) > 10, line


def test_the_command_shows_it(train: Train) -> None:
    done = train("--help")
    assert done.returncode == 0
    assert (
        "loss: balanced, balanced_softmax, bi_tempered, cross_entropy, custom, focal,"
        in done.stdout
    )
    assert "seed=0: Seed of weights, order and augmentation.\n" in done.stdout
