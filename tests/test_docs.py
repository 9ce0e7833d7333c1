"""The README and the docs are true: their commands run, their examples give what they print."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support import ROOT, Train, slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
# `make test` is what runs this test, and `make train` is `python train.py` after an installation
# that has already happened here.
MAKE = {"make train", "make test"}


def test_the_readme_has_commands() -> None:
    assert set(COMMANDS) > MAKE
    assert len(COMMANDS) >= 8


def test_the_make_targets_are_there() -> None:
    for command in MAKE:
        planned = subprocess.run(
            [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert {"make train": "train.py", "make test": "pytest"}[command] in planned.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in MAKE])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=slow)])
def test_a_command_of_the_readme_runs(
    command: str, whole: bool, train: Train, tmp_path: Path
) -> None:
    """As it stands in a process of its own, and for a single epoch of few images."""
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "train.py")
    if not whole:
        arguments = [each for each in arguments if not each.startswith("trainer.max_epochs")]
        arguments += ["trainer.max_epochs=1", "data.max_samples=200"]
    done = train(*arguments, timeout=300, anew=whole)
    assert done.returncode == 0, done.stderr
    assert "match at" in done.stdout


def test_the_loss_of_the_readme_works() -> None:
    import torch

    from equiloss.losses import get, register, registry

    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    poly2 = register(namespace["poly2"])
    try:
        logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
        # As in the paper: without a coefficient it is cross-entropy.
        assert torch.equal(poly2(logits, target, epsilon=0.0), get("cross_entropy")(logits, target))
    finally:
        registry.unregister("poly2")


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_examples_in_the_docs_print_what_they_say(page: str) -> None:
    failed, _ = doctest.testfile(str(ROOT / "docs" / page), module_relative=False)
    assert failed == 0


def test_every_source_file_of_the_proof_table_is_there() -> None:
    for file in re.findall(r"`(tests/[\w/]+\.py)`", README):
        assert (ROOT / file).is_file()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
