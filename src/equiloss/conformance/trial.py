"""Trials of losses by the laws, each law after those that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equiloss.conformance.law import Broken, DoesNotApply, Finding, Law
from equiloss.conformance.laws import LAWS
from equiloss.conformance.ranks import check_ranks, ranks
from equiloss.conformance.rows import loads
from equiloss.conformance.subject import LossRaised, Subject
from equiloss.conformance.verdict import Conformance, Outcome, Status
from equiloss.errors import LossError, unknown
from equiloss.imports import foreign_code, import_target
from equiloss.losses import registry
from equiloss.losses.signature import LossFunction


def verify(loss: str | LossFunction, /, **options: Any) -> Conformance:
    """Hold a loss against every law of a loss.

    Args:
        loss: A registered name, `package.module:function`, a function, or an nn.Module class.
        **options: Values of its own options. An option `num_classes` fixes the number of classes
            for all laws.

    Returns:
        The verdict; printed, it shows the smallest counter-example found to each broken law.

    Raises:
        LossError: for a name or an option that does not exist.

    >>> def hinge(logits, target, *, margin: float = 1.0):
    ...     own = logits.gather(-1, target.unsqueeze(-1))
    ...     return (margin + logits - own).relu().sum(-1).mean()
    >>> verdict = verify(hinge, margin=2.0)
    >>> verdict.holds, verdict.broken[0].law.name
    (False, 'shape')
    """
    return verify_all([loss], options)[0]


def verify_all(
    losses: Sequence[str | LossFunction],
    options: Mapping[str, Any] | None = None,
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Conformance]:
    """Hold several losses against every law; starts processes once for all of them.

    Args:
        losses: As for `verify`.
        options: Given to each of them.
        tell: Is given the name of each loss before its turn.

    Raises:
        LossError: for a name or an option that does not exist.
    """
    trials = [_Trial.start(loss, dict(options or {})) for loss in losses]
    for trial in trials:
        tell(trial.name)
        for law in LAWS:
            if law is not ranks and trial.may_run(law):
                trial.run(law)
    ready = [trial for trial in trials if trial.may_run(ranks)]
    tell("processes")
    began = time.perf_counter()
    findings = check_ranks([trial.subject for trial in ready if trial.subject is not None])
    share = (time.perf_counter() - began) / max(len(ready), 1)
    for trial, finding in zip(ready, findings, strict=True):
        trial.record(ranks, finding, share)
    return [trial.verdict() for trial in trials]


@dataclass
class _Trial:
    """A loss, and the outcomes of the laws that were checked so far."""

    name: str
    source: str
    subject: Subject | None
    options: dict[str, Any]
    outcomes: dict[Law, Outcome] = field(default_factory=dict)

    @classmethod
    def start(cls, loss: str | LossFunction, options: dict[str, Any]) -> _Trial:
        """Load a loss, and check its options; one that cannot be loaded has broken `loads`.

        Raises:
            LossError: for a name or an option that does not exist.
        """
        registered = isinstance(loss, str) and ":" not in loss
        if isinstance(loss, str):
            if registered and loss not in registry.names():
                raise LossError(unknown("loss", loss, registry.names()))
            name = loss.rpartition(":")[2]
            source = _source(loss) if registered else loss.partition(":")[0]
        else:
            name = getattr(loss, "__name__", type(loss).__name__)
            source = str(getattr(loss, "__module__", ""))
        trial = cls(name, source, None, options)
        try:
            with foreign_code():
                trial.subject = Subject(name, load(loss), options, registered=registered)
        except LossError as error:
            trial.record(loads, Broken.by_error(error), 0.0)
        except Exception as error:  # a loss may fail in any way, and ends no other's trial
            trial.record(loads, Broken.by_error(LossRaised(error)), 0.0)
        else:
            trial.subject.check_options()
        return trial

    def may_run(self, law: Law) -> bool:
        """Whether a law is still to be checked, and no law that it needs is broken."""
        return law not in self.outcomes and self._obstacle(law) is None

    def run(self, law: Law) -> None:
        """Check a law that may run, and record its outcome."""
        assert self.subject is not None
        began = time.perf_counter()
        finding: Finding
        try:
            finding = law.check(self.subject)
        except (Broken, DoesNotApply) as raised:
            finding = raised
        except LossRaised as error:
            finding = Broken.by_error(error)
        except Exception as error:  # such as an attribute of the loss that is no number
            finding = Broken.by_error(LossRaised(error))
        self.record(law, finding, time.perf_counter() - began)

    def record(self, law: Law, finding: Finding, seconds: float) -> None:
        """Record the outcome of a law by the finding of its check."""
        if isinstance(finding, Broken):
            outcome = Outcome(law, Status.BROKEN, example=finding.example, seconds=seconds)
        elif isinstance(finding, DoesNotApply):
            outcome = Outcome(law, Status.DOES_NOT_APPLY, str(finding), seconds=seconds)
        else:
            outcome = Outcome(law, Status.HOLDS, finding or "", seconds=seconds)
        self.outcomes[law] = outcome

    def verdict(self) -> Conformance:
        """The outcomes of all laws; those of laws that could not be checked name a broken one."""
        outcomes = []
        for law in LAWS:
            obstacle = self._obstacle(law)
            remark = "" if obstacle is None else f"needs {obstacle.name}"
            outcomes.append(self.outcomes.get(law, Outcome(law, Status.NOT_RUN, remark)))
        return Conformance(self.name, self.source, self.options, outcomes)

    def _obstacle(self, law: Law) -> Law | None:
        """The law itself if it is broken, else the first broken law that keeps it from running."""
        outcome = self.outcomes.get(law)
        if outcome is not None:
            return law if outcome.status == Status.BROKEN else None
        return next(filter(None, map(self._obstacle, law.needs)), None)


def load(loss: str | LossFunction) -> LossFunction:
    """Load the function or class of a registered name or a path; another one is returned as it is.

    Raises:
        LossError: if there is none, or it cannot be imported.
    """
    if not isinstance(loss, str):
        return loss
    return import_target(loss, "loss", LossError) if ":" in loss else registry.get(loss)


def _source(name: str) -> str:
    """The provider of a registered loss."""
    try:
        return registry.provider(name).source
    except LossError:
        return "claimed more than once"
