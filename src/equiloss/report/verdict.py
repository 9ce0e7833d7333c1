"""The verdict: do the formulations match, in each of the three ways, to what figure, where not?"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from equiloss.errors import PARITY_STOP
from equiloss.report.pairs import FORMULATIONS, WORLD_SIZES, Pair, largest
from equiloss.report.runs import Run

# Separate runs of one function in float64: rounding at 1e-16, amplified by training.
FLOAT64_BOUND = 1e-9
EXACT = "64-true"
# More names than this in a line hide what it says; the page and the data have them all.
NAMED = 6
# What a run that was stopped by parity.policy=raise says of itself (see `equiloss.parity.monitor`).
_STOPPED = re.compile(rf"{re.escape(PARITY_STOP)} \d+: (?P<what>.*)")
_FORMULATION = re.compile(r"(?P<name>[^\s,]+) \(error (?P<ratio>\S+) times its bound\)")


@dataclass
class Verdict:
    """Whether the formulations match."""

    word: str
    """match | differs | not checked."""
    ways: dict[str, str]
    """lockstep: match | differs | no completed run | not checked; float64: match | differs | not
    comparable | not measured; lower precision: reported | not measured."""
    lines: list[str]
    wrong: list[str]
    """What differs, by name."""
    where: list[str]
    """The same with the figures, and from which step on."""


@dataclass
class Lockstep:
    """What one run's parity checks found."""

    run: Run
    checks: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    """Largest error over its bound, of each formulation; infinite where an error was not finite."""
    disagreeing: list[str] = field(default_factory=list)
    """Formulations, and what else was beyond its bound."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows beyond the domain of each formulation."""

    @classmethod
    def of(cls, run: Run) -> Lockstep:
        """What `results.json` says; of a run that did not complete, what it logged and why."""
        found = cls(run)
        if run.completed:
            found._read_results()
        else:
            found._read_metrics()
            found._read_error(run.result.error or "")
        return found

    def _read_results(self) -> None:
        parity = self.run.result.parity
        self.checks = parity.get("steps", 0)
        for name, worst in parity.items():
            if isinstance(worst, dict):
                self.ratios[name] = _ratio(worst["ratio"])
                if not (worst["agree"] and self.ratios[name] <= 1):
                    self.disagreeing.append(name)
                if worst.get("out_of_domain"):
                    self.left_out[name] = worst["out_of_domain"]
        if parity and not parity["agree"] and not self.disagreeing:
            self.disagreeing.append("mass or all-reduced loss")

    def _read_metrics(self) -> None:
        for key, series in self.run.metrics.items():
            if key.startswith("parity/") and key.endswith("/ratio"):
                name = key.removeprefix("parity/").removesuffix("/ratio")
                self.checks = max(self.checks, len(series))
                self.ratios[name] = largest(value for _, value in series) or 0.0
        self.disagreeing = [name for name, ratio in self.ratios.items() if not ratio <= 1]

    def _read_error(self, error: str) -> None:
        stopped = _STOPPED.search(error)
        if stopped is None:
            return
        self.checks += 1
        for found in _FORMULATION.finditer(stopped["what"]):
            self._disagrees(found["name"], float(found["ratio"]))
        for sums in ("the mass", "the all-reduced loss"):
            if f"{sums} (" in stopped["what"]:
                self.disagreeing.append(sums.removeprefix("the "))
        if not self.disagreeing:
            self.disagreeing.append("parity")

    def _disagrees(self, name: str, ratio: float) -> None:
        self.ratios[name] = max(self.ratios.get(name, 0.0), _ratio(ratio))
        if name not in self.disagreeing:
            self.disagreeing.append(name)

    def where(self, name: str) -> str:
        """A formulation's largest error, and the first step at which it was beyond its bound."""
        told = f"{name} in {self.run.name}"
        if name in self.ratios:
            told += f": error up to {self.ratios[name]:.3g} times its bound"
            # The one other reason to disagree.
            told += "" if self.ratios[name] > 1 else ", and logits that are not finite"
        series = self.run.metrics.get(f"parity/{name}/ratio", [])
        first = next((step for step, value in series if not value <= 1), None)
        return told if first is None else f"{told}, first at step {first}"


def _ratio(value: float | None) -> float:
    """A ratio as results.json holds it: null where it was not finite."""
    return value if value is not None and math.isfinite(value) else math.inf


def largest_ratios(checked: Iterable[Lockstep]) -> dict[str, float]:
    """The largest ratio of each formulation over some runs."""
    worst: dict[str, float] = {}
    for found in checked:
        for name, ratio in found.ratios.items():
            worst[name] = max(worst.get(name, 0.0), ratio)
    return dict(sorted(worst.items()))


def judge(runs: Sequence[Run], pairs: Sequence[Pair], seeds: Sequence[float]) -> Verdict:
    """Say whether the formulations match.

    Args:
        runs: Every run; one that its parity checks stopped counts as much as a completed one.
        pairs: Runs that should take the same steps.
        seeds: Relative differences of the final test loss between seeds.
    """
    verdict = Verdict("not checked", {}, [], [], [])
    _lockstep([found for run in runs if (found := Lockstep.of(run)).checks], verdict)
    _float64([pair for pair in pairs if pair.precision == EXACT], verdict)
    _lower_precision([pair for pair in pairs if pair.precision != EXACT], seeds, verdict)
    _promised_bits(pairs, verdict)
    of = Counter(f"{pair.what}, {pair.precision}" for pair in pairs)
    same = Counter(f"{pair.what}, {pair.precision}" for pair in pairs if pair.bitwise)
    if same:
        told = [f"{what} ({count} of {of[what]} seeds)" for what, count in same.items()]
        verdict.lines.append(f"Bitwise equal losses at every step: {listed(told, '; ')}.")
    if verdict.wrong:
        verdict.word = "differs"
    elif verdict.ways["lockstep"] == "match":
        verdict.word = "match"
    return verdict


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b"]), listed([*"abcdefgh"])
    ('a, b', 'a, b, c, d, e, f and 2 more')
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more


def _lockstep(checked: Sequence[Lockstep], verdict: Verdict) -> None:
    wrong = [(found, name) for found in checked for name in found.disagreeing]
    names = [f"{name} in {found.run.name}" for found, name in wrong]
    completed = sum(found.run.completed for found in checked)
    if not checked:
        verdict.ways["lockstep"] = "not checked"
        verdict.lines.append("Lockstep: not checked.")
        return
    # What a run left that broke off proves a difference, but no match.
    state = "differs" if wrong else ("match" if completed else "no completed run")
    verdict.ways["lockstep"] = state
    checks = sum(found.checks for found in checked)
    broken_off = len(checked) - completed
    line = (
        f"Lockstep (same logits, {checks} checks in {len(checked)} runs"
        + (f", {broken_off} of them not completed" if broken_off else "")
        + f"): {state}{': ' if names else ''}{listed(names)}."
    )
    ratios = [f"{name} {ratio:.2g}" for name, ratio in largest_ratios(checked).items()]
    if ratios:
        line += f" Largest error over its bound: {', '.join(ratios)}."
    left_out: dict[str, int] = {}
    for found in checked:
        for name, rows in found.left_out.items():
            left_out[name] = left_out.get(name, 0) + rows
    if left_out:
        rows_told = ", ".join(f"{name} {rows}" for name, rows in sorted(left_out.items()))
        line += f" Rows beyond a formulation's domain, not judged: {rows_told}."
    verdict.lines.append(line)
    verdict.wrong += names
    verdict.where += [found.where(name) for found, name in wrong]


def _float64(pairs: Sequence[Pair], verdict: Verdict) -> None:
    if not pairs:
        verdict.ways["float64"] = "not measured"
        verdict.lines.append("Trajectories in float64: not measured.")
        return
    beyond = [pair for pair in pairs if pair.worst is not None and not pair.worst <= FLOAT64_BOUND]
    compared = [pair for pair in pairs if pair.apart or pair in beyond]
    without = [pair.label for pair in pairs if not pair.apart]
    state = "differs" if beyond else ("match" if compared else "not comparable")
    verdict.ways["float64"] = state
    line = f"Trajectories in float64 ({len(compared)} pairs of runs): {state}."
    worst = largest(pair.worst for pair in compared if pair.worst is not None)
    if worst is not None:
        line += f" Largest relative difference {worst:.2g}, bound {FLOAT64_BOUND:g}."
    if without:
        line += f" Not comparable, without a step in common: {listed(without, '; ')}."
    verdict.lines.append(line)
    verdict.wrong += [f"{pair.label} (float64)" for pair in beyond]
    for pair in beyond:
        told = f"{pair.label} (float64): relative difference up to {pair.worst:.2g}"
        first = pair.first_beyond(FLOAT64_BOUND)
        verdict.where.append(told if first is None else f"{told}, first at step {first}")


def _lower_precision(pairs: Sequence[Pair], seeds: Sequence[float], verdict: Verdict) -> None:
    verdict.ways["lower precision"] = "not measured"
    for kind in (FORMULATIONS, WORLD_SIZES):
        drift = [
            pair.test_loss for pair in pairs if pair.kind == kind and pair.test_loss is not None
        ]
        if drift:
            beside = f"between seeds {_drift(seeds)}" if seeds else "no two seeds to compare with"
            verdict.ways["lower precision"] = "reported"
            verdict.lines.append(
                f"Drift in lower precision, {kind} (final test loss, {len(drift)} pairs): largest "
                f"relative difference {_drift(drift)}; {beside}. Rounding that training "
                "amplifies: never judged."
            )


def _promised_bits(pairs: Sequence[Pair], verdict: Verdict) -> None:
    """Runs on other numbers of devices with trainer.reduction=bitwise, and other bits."""
    for pair in pairs:
        first = next((step for step, value in pair.apart if value != 0), None)
        if pair.other_bits is None or first is None:
            continue
        why = f"they differ in {', '.join(pair.other_bits)}" if pair.other_bits else "unexplained"
        verdict.lines.append(
            f"Other bits in spite of trainer.reduction=bitwise: {pair.label} ({why})."
        )
        if not pair.other_bits:
            verdict.wrong.append(f"{pair.label} (bits)")
            verdict.where.append(f"{pair.label} (bits): first at step {first}")


def _drift(differences: Sequence[float]) -> str:
    return f"{largest(differences):.2g} ({statistics.fmean(differences):.2g} on average)"
