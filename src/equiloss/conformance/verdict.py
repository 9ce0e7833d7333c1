"""What the laws say of a loss, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from equiloss.conformance.law import CounterExample, Law
from equiloss.records.results import environment


class Status(StrEnum):
    """What became of a law."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_RUN = "not run"
    DOES_NOT_APPLY = "does not apply"


@dataclass(frozen=True)
class Outcome:
    """What the check of one law found."""

    law: Law
    status: Status
    remark: str = ""
    """Why a law was not run or does not apply; what else there is to say where it holds."""
    example: CounterExample | None = None
    """Where it is broken."""
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The broken law with its counter-example."""
        example = [] if self.example is None else self.example.lines()
        return [f"{self.law.name}: {self.law.sentence}", *(f"    {line}" for line in example)]


@dataclass(frozen=True)
class Conformance:
    """The verdict on one loss."""

    name: str
    source: str
    """Who provides it."""
    options: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    """In the order of `LAWS`."""

    @property
    def holds(self) -> bool:
        """Whether no law is broken."""
        return not self.broken

    @property
    def broken(self) -> list[Outcome]:
        """The broken laws; the first is the one to mend first."""
        return [outcome for outcome in self.outcomes if outcome.status == Status.BROKEN]

    @property
    def seconds(self) -> float:
        """Time that the checks took."""
        return sum(outcome.seconds for outcome in self.outcomes)

    def count(self, status: Status) -> int:
        """How many laws fared so."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def counts(self) -> str:
        """How many laws fared how."""
        words = {Status.HOLDS: "hold", Status.DOES_NOT_APPLY: "not applicable"}
        numbers = {words.get(status, status): self.count(status) for status in Status}
        return ", ".join(f"{number} {word}" for word, number in numbers.items() if number)

    def __str__(self) -> str:
        """The verdict in words, with a counter-example for each broken law."""
        given = (f"{key}={value!r}" for key, value in self.options.items())
        verdict = "conforms" if self.holds else "BREAKS A LAW"
        called = ", ".join([self.name, *given])
        lines = [f"{called} {verdict} ({len(self.outcomes)} laws: {self.counts})"]
        for outcome in self.broken:
            lines += ["", *outcome.lines()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {
            "name": self.name,
            "source": self.source,
            "options": dict(self.options),
            "conforms": self.holds,
            "first_broken": self.broken[0].law.name if self.broken else None,
            "seconds": round(self.seconds, 3),
            "laws": [_as_dict(outcome) for outcome in self.outcomes],
        }


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": outcome.law.name,
        "sentence": outcome.law.sentence,
        "status": str(outcome.status),
        "remark": outcome.remark,
        "seconds": round(outcome.seconds, 3),
    }
    if outcome.example is not None:
        found["counter_example"] = {
            "code": outcome.example.code,
            "what": outcome.example.what,
            "got": outcome.example.got,
            "expected": outcome.example.expected,
        }
    return found


def as_json_data(verdicts: Sequence[Conformance]) -> dict[str, Any]:
    """All verdicts, and what they may depend on."""
    return {
        "conforms": all(verdict.holds for verdict in verdicts),
        "environment": environment(torch.device("cpu")),
        "losses": [verdict.as_dict() for verdict in verdicts],
    }


def show(verdicts: Sequence[Conformance], console: Console) -> None:
    """Print every law of one loss, or a line for each of several; then what is broken."""
    console.print(_laws(verdicts[0]) if len(verdicts) == 1 else _summary(verdicts))
    for verdict in verdicts:
        if not verdict.holds or len(verdicts) == 1:
            # As it is, to be copied: neither wrapped nor coloured.
            console.print(str(verdict), markup=False, highlight=False, soft_wrap=True)


def _laws(verdict: Conformance) -> Table:
    table = Table("law", "status", "what it says", title=verdict.name)
    for outcome in verdict.outcomes:
        remark = f" ({outcome.remark})" if outcome.remark else ""
        table.add_row(outcome.law.name, str(outcome.status), outcome.law.sentence + remark)
    return table


def _summary(verdicts: Sequence[Conformance]) -> Table:
    table = Table()
    table.add_column("loss", no_wrap=True)  # what `equiloss verify NAME` takes
    for head in ("source", "verdict", "laws"):
        table.add_column(head, overflow="fold")
    table.add_column("seconds", justify="right")
    for verdict in verdicts:
        broken = ", ".join(outcome.law.name for outcome in verdict.broken)
        table.add_row(
            verdict.name,
            verdict.source,
            f"breaks {broken}" if broken else "conforms",
            verdict.counts,
            f"{verdict.seconds:.1f}",
        )
    return table
