"""`equiloss verify`: a table, JSON, and an exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.conformance.laws import LAWS
from equiloss.losses import registry


def verify(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    runner = CliRunner(env={"COLUMNS": "200"})
    result = runner.invoke(app, ["verify", *arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> str:
    """A loss that conforms, registered by the code of this process alone."""

    def scaled(logits, target, *, scale: float = 1.0):
        return scale * F.cross_entropy(logits, target, reduction="none")

    provider = registry.Provider("scaled", "this test", lambda: scaled)
    monkeypatch.setitem(registry._registered, "scaled", provider)
    return "scaled"


def test_a_right_loss_has_every_law_in_the_table_and_exits_0(right):
    code, output, _ = verify(right, "--set", "scale=2")
    assert code == 0
    assert all(law.name in output for law in LAWS)
    assert "not in a module by its name" in output
    assert "scaled, scale=2.0 conforms (25 laws: " in output


def test_a_list_is_an_option_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lists.py").write_text(
        "import torch.nn.functional as F\n"
        "def powered(logits, target, *, powers: list[float] = [1.0]):\n"
        "    return F.cross_entropy(logits, target, reduction='none') * sum(powers)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, output, _ = verify("my_lists:powered", "--set", "powers=[2,1.0]")
    assert code == 0
    assert "powered, powers=[2.0, 1.0] conforms" in output
    _, _, error = verify("my_lists:powered", "--set", "powers=[a]")
    assert error == "error: powers[0]: Value 'a' of type 'str' could not be converted to Float\n"


def test_wrong_ones_get_a_line_each_then_their_counter_examples_and_exit_1(mutants):
    code, output, _ = verify("scalar", "noisy", "import_error")
    assert code == 1
    for name, law in (("scalar", "shape"), ("noisy", "repeatable"), ("import_error", "loads")):
        (line,) = [line for line in output.splitlines() if line.startswith(f"│ {name} ")]
        assert "equiloss-mutants 0.1" in line
        assert f"breaks {law} " in line
    assert "losses = Criterion('noisy').per_sample(logits, target)\n" in output
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'" in output


class TestJson:
    def test_on_standard_output_it_stands_alone(self, mutants):
        code, output, _ = verify("--json", "-", "half_detached", "--set", "gamma=1")
        assert code == 1
        found = json.loads(output)
        assert found["conforms"] is False
        assert "torch" in found["environment"]["versions"]
        (loss,) = found["losses"]
        assert (loss["name"], loss["source"]) == ("half_detached", "equiloss-mutants 0.1")
        assert loss["options"] == {"gamma": 1.0}
        assert loss["first_broken"] == "gradient"
        laws = {law["name"]: law for law in loss["laws"]}
        assert list(laws) == [law.name for law in LAWS]
        example = laws["gradient"]["counter_example"]
        assert example["got"] == "[[-0.25, 0.25]]"
        assert example["code"].startswith("logits = torch.tensor([[0.0, 0.0]]")
        assert laws["extremes"] == {
            "name": "extremes",
            "sentence": "Loss and gradient are finite at extreme logits, or up to max_logit_range.",
            "status": "not run",
            "remark": "needs gradient",
            "seconds": 0.0,
        }

    def test_in_a_file_it_accompanies_the_table(self, mutants, tmp_path: Path):
        code, output, _ = verify("scalar", "--json", str(tmp_path / "verdict.json"))
        assert code == 1
        assert "scalar BREAKS A LAW" in output
        found = json.loads((tmp_path / "verdict.json").read_text())
        assert found["losses"][0]["first_broken"] == "shape"


def test_without_a_name_all_registered_losses_are_meant(mutants, monkeypatch):
    monkeypatch.setattr(registry, "names", lambda: ["column", "scalar"])
    code, output, _ = verify()
    assert code == 1
    assert "column BREAKS A LAW" in output
    assert "scalar BREAKS A LAW" in output


class TestByPath:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        (tmp_path / "my_own_losses.py").write_text(
            "def summed(logits, target, *, factor: float = 1.0):\n"
            "    return factor * logits.sum()\n"
        )
        (tmp_path / "my_broken_losses.py").write_text("raise ZeroDivisionError('today')\n")

    def test_a_loss_of_the_working_directory_is_verified(self):
        code, output, _ = verify("my_own_losses:summed", "--set", "factor=3")
        assert code == 1
        assert "summed, factor=3.0 BREAKS A LAW" in output
        assert "Criterion(summed, factor=3.0).per_sample(logits, target)" in output

    def test_one_that_cannot_be_imported_fails_with_its_error(self):
        code, output, _ = verify("my_broken_losses:summed", "--set", "factor=3")
        assert code == 1
        assert "cannot be imported: ZeroDivisionError: today" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cross_entopy",), "unknown loss 'cross_entopy'. Did you mean 'cross_entropy'?"),
        (("half_detached", "--set", "gama=1"), "'gama'. Did you mean 'gamma'? Known: gamma"),
        (("half_detached", "--set", "gamma=two"), "gamma: Value 'two' of type 'str'"),
        (("half_detached", "--set", "gamma"), "--set takes OPTION=VALUE, got 'gamma'"),
        (("cross_entropy", "--set", "weight=[1,2]"), "is verified with every weight"),
        (("--set", "gamma=1"), "name one"),
    ],
)
def test_a_mistake_of_the_user_gets_one_line(mutants, arguments, message):
    code, output, error = verify(*arguments)
    assert (code, output) == (1, "")
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
