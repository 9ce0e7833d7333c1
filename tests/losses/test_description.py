"""Losses described without importing torch, and never from a file that is out of date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equiloss.losses import description, registry
from equiloss.losses.description import describe
from equiloss.records import remembered
from equiloss.records.remembered import recall, remember
from support import ROOT

# Both commands as a user gives them, in one process.
COMMANDS = """
import sys
from equiloss.cli import app
from equiloss.config import resolved
from equiloss.losses import config_source
from hydra import compose, initialize_config_dir

app(["losses"], standalone_mode=False)
resolved.register_schema()
config_source.install()
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    print(compose("config", ["loss=focal"]).loss)
print("torch" in sys.modules)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(remembered.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the losses that were read, and not recalled."""
    read, names = description._read, []
    monkeypatch.setattr(description, "_read", lambda name: names.append(name) or read(name))
    return names


def built_in() -> list[str]:
    return [name for name in registry.names() if registry.provider(name).source == registry.OURS]


def test_what_is_kept_is_what_was_read(cache, reads):
    first = {name: describe(name) for name in built_in()}
    assert reads == built_in()
    assert {name: describe(name) for name in built_in()} == first
    assert reads == built_in()
    for name, described in first.items():
        signature = registry.signature(name)
        assert described.options == signature.options
        assert list(described.options) == list(signature.options)
        assert described.shift_invariant == signature.is_shift_invariant()


def test_torch_is_not_imported_a_second_time(cache):
    environment = {**os.environ, remembered.CACHE: str(cache)}
    command = [sys.executable, "-c", COMMANDS, str(ROOT / "conf")]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        for _ in range(2)
    )
    assert first.endswith("True\n")
    assert second == first.removesuffix("True\n") + "False\n"


def test_a_changed_file_of_the_package_is_read_anew(cache, reads, monkeypatch, tmp_path):
    (tmp_path / "loss.py").write_text("")
    monkeypatch.setattr(description, "HERE", tmp_path)
    describe("focal")
    describe("focal")
    assert reads == ["focal"]
    os.utime(tmp_path / "loss.py", ns=(1, 1))
    describe("focal")
    assert reads == ["focal", "focal"]
    monkeypatch.setattr(description, "version", lambda _: "0")
    describe("focal")
    assert reads == ["focal"] * 3


def test_what_is_damaged_is_read_anew(cache, reads):
    right = describe("focal")
    (file,) = (cache / "losses").iterdir()
    written = file.read_text()
    whole = recall(description.KIND, description.HERE)
    kept = whole["losses"]["focal"]
    gamma = kept["options"]["gamma"]
    for damage in (
        {},
        {**whole, "losses": []},
        {**whole, "losses": {"focal": []}},
        {**whole, "losses": {"focal": {}}},
        *(
            {**whole, "losses": {"focal": {**kept, "options": options}}}
            for options in ([], {"gamma": gamma[:2]}, {"gamma": ["complex", *gamma[1:]]})
        ),
    ):
        remember(description.KIND, description.HERE, damage)
        reads.clear()
        assert describe("focal") == right
        assert reads == ["focal"]

    # Another default, as a single digit makes it.
    assert written.count("2.0") == 1
    file.write_text(written.replace("2.0", "3.0"))
    reads.clear()
    assert describe("focal") == right
    assert reads == ["focal"]


def test_losses_of_others_are_not_kept(cache):
    @registry.register(name="passing")
    def passing(logits, target, *, gamma: float = 1.0): ...

    try:
        assert describe("passing").options["gamma"].default == 1.0
        registry.unregister("passing")

        @registry.register(name="passing")
        def changed(logits, target, *, gamma: float = 2.0): ...

        assert describe("passing").options["gamma"].default == 2.0
        assert not cache.exists()
    finally:
        registry.unregister("passing")
