"""Verdicts of the laws on losses, as text, tables and plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from equiloss.conformance.law import CounterExample, Law
from equiloss.records.results import environment


class Status(StrEnum):
    """Status of a law after a trial."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_RUN = "not run"
    DOES_NOT_APPLY = "does not apply"


@dataclass(frozen=True)
class Outcome:
    """Outcome of one law for one loss."""

    law: Law
    status: Status
    remark: str = ""
    """Why a law was not run or does not apply; where it holds, a remark of its check."""
    example: CounterExample | None = None
    """Counter-example to a broken law."""
    seconds: float = 0.0
    """Time that the check took."""

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        example = {} if self.example is None else {"counter_example": asdict(self.example)}
        return {
            "name": self.law.name,
            "sentence": self.law.sentence,
            "status": str(self.status),
            "remark": self.remark,
            "seconds": round(self.seconds, 3),
            **example,
        }


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

    @property
    def counts(self) -> str:
        """The number of laws with each status, in words."""
        words = {Status.HOLDS: "hold", Status.DOES_NOT_APPLY: "not applicable"}
        counts = Counter(outcome.status for outcome in self.outcomes)
        return ", ".join(f"{counts[key]} {words.get(key, key)}" for key in Status if counts[key])

    def __str__(self) -> str:
        """The verdict in words, with a counter-example for each broken law."""
        options = (f"{key}={value!r}" for key, value in self.options.items())
        verdict = "conforms" if self.holds else "BREAKS A LAW"
        loss = ", ".join([self.name, *options])
        lines = [f"{loss} {verdict} ({len(self.outcomes)} laws: {self.counts})"]
        for outcome in self.broken:
            assert outcome.example is not None
            lines += ["", f"{outcome.law.name}: {outcome.law.sentence}"]
            lines += [f"    {line}" for line in outcome.example.lines()]
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
            "laws": [outcome.as_dict() for outcome in self.outcomes],
        }


def as_json_data(verdicts: Sequence[Conformance]) -> dict[str, Any]:
    """The verdicts and the environment that they may depend on, as plain data."""
    return {
        "conforms": all(verdict.holds for verdict in verdicts),
        "environment": environment(torch.device("cpu")),
        "losses": [verdict.as_dict() for verdict in verdicts],
    }


def show(verdicts: Sequence[Conformance], console: Console) -> None:
    """Print a table of the laws of one loss, or of several losses; then the counter-examples."""
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
    table = Table(
        Column("loss", no_wrap=True),  # what `equiloss verify NAME` takes
        *(Column(header, overflow="fold") for header in ("source", "verdict", "laws")),
        Column("seconds", justify="right"),
    )
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
