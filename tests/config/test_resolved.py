"""What is accepted can be stored and read back; all else is refused naming the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from equiloss.config.resolved import MARKS, ResolvedConfig, resolve
from equiloss.errors import ConfigError
from equiloss.records.reading import read_yaml
from support import composed

Changed = Callable[..., ResolvedConfig]


@pytest.fixture(scope="module")
def changed() -> Changed:
    plain = composed("data=synthetic", "logger=csv").plain

    def call(key: str, value: Any) -> ResolvedConfig:
        config = OmegaConf.create(plain)
        OmegaConf.update(config, key, value, merge=False, force_add=True)
        return resolve(config)

    return call


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**63, "has an integer beyond 64 bits at model.options.x"),
        ([0, {"y": -(10**30)}], "has an integer beyond 64 bits at model.options.x.y"),
        ({1: 2}, "has the key 1, which is no text at model.options.x"),
        ("x" * 20_001, "has a value of more than 20000 characters at model.options.x"),
        ("\udcff", "has a value that is no text in UTF-8 at model.options.x"),
    ],
)
def test_what_could_not_be_read_back_is_refused(changed: Changed, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^the configuration {words}, and could not be stored$"):
        changed("model.options.x", value)


@pytest.mark.parametrize("value", [2**63 - 1, -(2**62), "x" * 20_000, "é\x1b\u2028😀", {"": [{}]}])
def test_what_is_accepted_is_read_back(changed: Changed, value: Any, tmp_path: Path) -> None:
    resolved = changed("model.options.x", value)
    (tmp_path / "config.yaml").write_text(resolved.text, encoding="utf-8")
    stored = read_yaml(tmp_path / "config.yaml")
    assert replace(resolved, plain=stored).hash == resolved.hash


@pytest.mark.parametrize("key", ["loss", "trainer", "data.augment", "logger.wandb"])
def test_a_value_in_the_place_of_a_group_is_named(changed: Changed, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is a group of keys, not a value; got \['a'\]$"):
        changed(key, ["a"])


@pytest.mark.parametrize("key", sorted(MARKS))
def test_what_marks_a_configuration_as_ours_cannot_be_removed(changed: Changed, key: str) -> None:
    plain = changed("seed", 1).plain
    del plain[key]
    with pytest.raises(ConfigError, match=rf"^{key} cannot be removed: leave ~{key} out$"):
        resolve(OmegaConf.create(plain))


@pytest.mark.parametrize("group", ["checkpoint", "early_stopping"])
class TestMode:
    """Whether a small or a large value is kept follows from what is monitored."""

    @pytest.mark.parametrize(("name", "mode"), [("nll", "min"), ("acc", "max"), ("ece", "min")])
    def test_it_is_stored_as_if_it_had_been_given(self, group: str, name: str, mode: str) -> None:
        monitor = f"{group}.monitor=val/{name}"
        found = composed(monitor)
        assert found.plain[group]["mode"] == mode
        assert composed(monitor, f"{group}.mode={mode}").hash == found.hash

    def test_one_that_keeps_the_worst_is_refused(self, group: str) -> None:
        words = rf"^{group}\.mode=min would keep the worst val/acc_top5: it is max"
        with pytest.raises(ConfigError, match=words):
            composed(f"{group}.monitor=val/acc_top5", f"{group}.mode=min")
