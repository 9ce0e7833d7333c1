"""A broken plugin gets one clear error where it is chosen, and is in nobody else's way."""

from __future__ import annotations

import pytest

from equiloss.errors import LossError, NonFiniteError, UserError
from equiloss.launching.composition_errors import explain
from equiloss.losses import registry
from support import Install, Run

SMALL = ("model=mlp", "data.max_samples=32", "trainer.max_steps=1", "parity=off")

# What is wrong with a loss, and the error of a run that chooses it.
BROKEN: list[tuple[str, type[UserError], str]] = [
    (
        "import_error",
        LossError,
        "loss 'import_error' of equiloss-mutants 0.1 (equiloss_mutants.unimportable:import_error) "
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
    ),
    (
        "wrong_signature",
        LossError,
        "equiloss-mutants 0.1: loss 'wrong_signature' has the positional arguments "
        "(prediction, target): a loss is written (logits, target, *, …)",
    ),
    ("scalar", LossError, "loss 'scalar' returned [] for 32 rows"),
    ("detached", LossError, "loss 'detached' returned a result without gradient"),
    (
        "not_a_number",
        NonFiniteError,
        "`equiloss verify not_a_number` tells whether the loss is at fault",
    ),
    (
        "twice",
        LossError,
        "loss name 'twice' is claimed by other-losses 2.0 and one-losses 1.0",
    ),
]


@pytest.fixture
def broken_plugins(mutants: list[str], install: Install) -> None:
    """All of them at once."""
    install("one-losses", "1.0", "twice = one_losses:twice")
    install("other-losses", "2.0", "twice = other_losses:twice")


@pytest.mark.parametrize(("name", "error", "message"), BROKEN)
def test_choosing_it_gives_one_clear_error(broken_plugins, run_here: Run, name, error, message):
    with pytest.raises(error) as caught:
        run_here(*SMALL, f"loss={name}")
    told = explain(caught.value)
    assert message in told
    assert len(told.splitlines()) == 1


def test_other_losses_train_beside_it(broken_plugins, run_here: Run):
    result = run_here(*SMALL, "loss=cross_entropy")
    assert result.status == "completed"
    assert {"twice", "import_error"} <= set(registry.names())
