"""The verdict: do the formulations match in lockstep, in float64 and in lower precision?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from equiloss.errors import printable
from equiloss.records.results import beyond
from equiloss.report.pairs import FORMULATIONS, WORLD_SIZES, Pair, first_beyond, maximum
from equiloss.report.runs import Run, Series

# Separate runs of one function in float64: rounding at 1e-16, amplified by training.
FLOAT64_BOUND = 1e-9
EXACT = "64-true"
THREE = ("softmax_nll", "log_softmax_nll", "cross_entropy")
# More names than this in a line hide what it says; the page and the data have them all.
NAMED = 6


@dataclass
class Verdict:
    """Whether the formulations agree, and runs that should be the same match."""

    word: str
    """match | agree | differs | not checked: only runs that should take the same steps can match;
    where there are none, the formulations agree on the logits of each run."""
    ways: dict[str, str]
    """lockstep: match | differs | no completed run | not checked; float64: match | differs | not
    comparable | not measured; lower precision: reported | not measured."""
    lines: list[str]
    wrong: list[str]
    """What differs, by name."""
    where: list[str]
    """The same with the figures, and from which step on."""
    agreement: str = ""
    """What agrees with what, in how many checks and how closely."""

    @property
    def headline(self) -> str:
        """The word, and what it is about."""
        parts = [self.word] if self.word != "agree" else []
        if self.word == "differs":
            parts.append(listed(self.wrong))
        if self.agreement:
            parts.append(self.agreement)
        if self.ways["float64"] == "match":
            parts.append(f"trajectories in float64 within {FLOAT64_BOUND:g}")
        return printable(f"verdict: {'; '.join(parts)}")

    def __str__(self) -> str:
        """The headline and the lines, for a terminal."""
        return "\n- ".join([self.headline, *map(printable, self.lines)])


@dataclass
class Lockstep:
    """Result of the parity checks of one run."""

    run: Run
    checks: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    """Largest error over its bound, of each formulation; infinite where an error was not finite."""
    disagreeing: list[str] = field(default_factory=list)
    """Formulations, and what else was beyond its bound."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows beyond the domain of each formulation."""

    @classmethod
    def from_run(cls, run: Run) -> Lockstep:
        """Read the checks from `results.json`, or what was logged of a run that left none there."""
        lockstep = cls(run)
        if run.completed or run.result.parity:
            lockstep._read_results()
        else:
            lockstep._read_metrics()
        return lockstep

    def _read_results(self) -> None:
        parity = self.run.result.parity
        self.checks = parity.get("steps", 0)
        for name, worst in parity.items():
            if isinstance(worst, dict):
                ratio = worst["ratio"]  # null where it was not finite
                finite = ratio is not None and math.isfinite(ratio)
                self.ratios[name] = ratio if finite else math.inf
                if not (worst["agree"] and self.ratios[name] <= 1):
                    self.disagreeing.append(name)
                if worst.get("out_of_domain"):
                    self.left_out[name] = worst["out_of_domain"]
        self.disagreeing += beyond(parity)

    def _read_metrics(self) -> None:
        for key, series in self.run.metrics.items():
            if key.startswith("parity/") and key.endswith("/ratio"):
                name = key.removeprefix("parity/").removesuffix("/ratio")
                self.checks = max(self.checks, len(series))
                self.ratios[name] = maximum(value for _, value in series) or 0.0
        self.disagreeing = [name for name, ratio in self.ratios.items() if not ratio <= 1]

    def describe(self, name: str) -> str:
        """A formulation's largest error, and the first step at which it was beyond its bound."""
        text = f"{name} in {self.run.name}"
        if name in self.ratios:
            text += f": error up to {self.ratios[name]:.3g} times its bound"
            # The one other reason to disagree.
            text += "" if self.ratios[name] > 1 else ", and logits that are not finite"
        return text + _first_step(self.run.metrics.get(f"parity/{name}/ratio", []), 1)


def _first_step(series: Series, bound: float) -> str:
    """The first step at which a series is beyond a bound, as the end of a sentence."""
    step = first_beyond(series, bound)
    return "" if step is None else f", first at step {step}"


def largest_ratios(checked: Sequence[Lockstep]) -> dict[str, float]:
    """The largest ratio of each formulation over some runs."""
    names = sorted({name for lockstep in checked for name in lockstep.ratios})
    return {name: max(lockstep.ratios.get(name, 0.0) for lockstep in checked) for name in names}


def formulations(names: Iterable[str]) -> str:
    """The formulations by name, the three of them by that.

    >>> formulations(["softmax_nll", "log_softmax_nll", "cross_entropy"]), formulations(["a", "b"])
    ('the three formulations', 'a, b')
    """
    return "the three formulations" if {*names} == {*THREE} else listed([*names])


def judge(runs: Sequence[Run], pairs: Sequence[Pair], seed_drift: Sequence[float]) -> Verdict:
    """Judge whether the formulations match.

    Args:
        runs: Every run; one that its parity checks stopped counts as much as a completed one.
        pairs: Runs that should take the same steps.
        seed_drift: Relative differences of the final test loss between seeds.
    """
    ways = {"lockstep": "not checked", "float64": "not measured", "lower precision": "not measured"}
    verdict = Verdict("not checked", ways, [], [], [])
    _lockstep([lockstep for run in runs if (lockstep := Lockstep.from_run(run)).checks], verdict)
    _float64([pair for pair in pairs if pair.precision == EXACT], verdict)
    _lower_precision([pair for pair in pairs if pair.precision != EXACT], seed_drift, verdict)
    _promised_bits(pairs, verdict)
    seeds = Counter(f"{pair.name}, {pair.precision}" for pair in pairs)
    bitwise = Counter(f"{pair.name}, {pair.precision}" for pair in pairs if pair.bitwise)
    if bitwise:
        equal = [f"{name} ({count} of {seeds[name]} seeds)" for name, count in bitwise.items()]
        verdict.lines.append(f"Bitwise equal losses at every step: {listed(equal, '; ')}.")
    if verdict.wrong:
        verdict.word = "differs"
    elif verdict.ways["lockstep"] == "match":
        verdict.word = "match" if pairs else "agree"
    return verdict


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b"]), listed([*"abcdefgh"])
    ('a, b', 'a, b, c, d, e, f and 2 more')
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more


def _lockstep(checked: Sequence[Lockstep], verdict: Verdict) -> None:
    """Judge the parity checks: the formulations on the same logits."""
    if not checked:
        verdict.lines.append("Lockstep: not checked.")
        return
    wrong = [(lockstep, name) for lockstep in checked for name in lockstep.disagreeing]
    names = [f"{name} in {lockstep.run.name}" for lockstep, name in wrong]
    broken_off = sum(not lockstep.run.completed for lockstep in checked)
    # What a run left that broke off proves a difference, but no match.
    agreed = "match" if broken_off < len(checked) else "no completed run"
    state = "differs" if wrong else agreed
    checks = sum(lockstep.checks for lockstep in checked)
    line = (
        f"Lockstep (same logits, {checks} checks in {len(checked)} runs"
        + (f", {broken_off} of them not completed" if broken_off else "")
        + f"): {state}{': ' if names else ''}{listed(names)}."
    )
    ratios = [f"{name} {ratio:.2g}" for name, ratio in largest_ratios(checked).items()]
    if ratios:
        line += f" Largest error over its bound: {', '.join(ratios)}."
    left_out: Counter[str] = Counter()
    for lockstep in checked:
        left_out.update(lockstep.left_out)
    if left_out:
        rows = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items()))
        line += f" Rows beyond a formulation's domain, not judged: {rows}."
    if state == "match" and ratios:
        largest = max(largest_ratios(checked).values())
        verdict.agreement = (
            f"{formulations(largest_ratios(checked))} agree on every run's logits "
            f"({checks} checks, largest error {largest:.2g} of its bound)"
        )
    verdict.ways["lockstep"] = state
    verdict.lines.append(line)
    verdict.wrong += names
    verdict.where += [lockstep.describe(name) for lockstep, name in wrong]


def _float64(pairs: Sequence[Pair], verdict: Verdict) -> None:
    """Judge the trajectories of float64 runs against their bound."""
    if not pairs:
        verdict.lines.append("Trajectories in float64: not measured.")
        return
    beyond = [pair for pair in pairs if (pair.largest or 0) > FLOAT64_BOUND]
    compared = [pair for pair in pairs if pair.differences or pair in beyond]
    without = [pair.label for pair in pairs if not pair.differences]
    state = "differs" if beyond else ("match" if compared else "not comparable")
    line = f"Trajectories in float64 ({len(compared)} pairs of runs): {state}."
    if compared:
        worst = max(pair.largest or 0 for pair in compared)
        line += f" Largest relative difference {worst:.2g}, bound {FLOAT64_BOUND:g}."
    if without:
        line += f" Not comparable, without a step in common: {listed(without, '; ')}."
    verdict.ways["float64"] = state
    verdict.lines.append(line)
    verdict.wrong += [f"{pair.label} (float64)" for pair in beyond]
    verdict.where += [
        f"{pair.label} (float64): relative difference up to {pair.largest:.2g}"
        + _first_step(pair.differences, FLOAT64_BOUND)
        for pair in beyond
    ]


def _lower_precision(pairs: Sequence[Pair], seed_drift: Sequence[float], verdict: Verdict) -> None:
    """Report the drift in lower precision beside the differences between seeds."""
    seeds = f"between seeds {_drift(seed_drift)}" if seed_drift else "no two seeds to compare with"
    for kind in (FORMULATIONS, WORLD_SIZES):
        drift = [p.test_loss for p in pairs if p.kind == kind and p.test_loss is not None]
        if drift:
            verdict.ways["lower precision"] = "reported"
            verdict.lines.append(
                f"Drift in lower precision, {kind} (final test loss, {len(drift)} pairs): largest "
                f"relative difference {_drift(drift)}; {seeds}. Rounding that training "
                "amplifies: never judged."
            )


def _promised_bits(pairs: Sequence[Pair], verdict: Verdict) -> None:
    """Judge runs with trainer.reduction=bitwise on other numbers of devices: same bits?"""
    for pair in pairs:
        first = first_beyond(pair.differences, 0)
        if pair.causes is None or first is None:
            continue
        why = f"they differ in {', '.join(pair.causes)}" if pair.causes else "unexplained"
        line = f"Other bits in spite of trainer.reduction=bitwise: {pair.label} ({why})."
        verdict.lines.append(line)
        if not pair.causes:
            verdict.wrong.append(f"{pair.label} (bits)")
            verdict.where.append(f"{pair.label} (bits): first at step {first}")


def _drift(differences: Sequence[float]) -> str:
    return f"{maximum(differences):.2g} ({sum(differences) / len(differences):.2g} on average)"
