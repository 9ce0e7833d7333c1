"""Evidence, while a run trains, that the formulations are one function.

At parity steps each formulation is evaluated on the logits and targets of the global batch, with
the run's own weights, smoothing and ignored rows, and held against the oracle row by row.
Trained logits hide mistakes (at a margin of 20 forgotten class weights would pass), so each
check also evaluates a *probe*: unit-normal logits with the same targets and options.

Rows beyond a formulation's domain are counted and left out of its verdict: a healthy
cross-entropy run whose logits spread past 87 must not be failed by its monitor.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from equiloss.config import Config, ParityConfig
from equiloss.errors import LossError, ParityError
from equiloss.losses.criterion import Criterion
from equiloss.parity import oracle, sums
from equiloss.parity.agreement import Agreement, Rows, Seen, compare, same_function
from equiloss.parity.gradient import Followed, Watch
from equiloss.training.step import StepOutcome

if TYPE_CHECKING:
    from equiloss.data.sources import Batch
    from equiloss.training.classifier import Classifier

log = logging.getLogger(__name__)


class ParityMonitor(Callback):
    """Holds every formulation against the oracle while a run trains.

    Args:
        config: How often, which formulations, and what a disagreement does.
        criterion: The loss that trains; its weights, smoothing and ignored rows are used.
        total_steps: Steps of a run that goes to its end; the last of them is checked.
        seed: Seed of the probe.
        class_counts: Rows of each training class, for formulations that want them.
        by_row: Whether the network was seen to be a function of the row, so that one can be
            forwarded again.

    Raises:
        LossError: if a formulation is unknown, or lacks an option that the run uses.
        ParityError: with policy=raise, on every rank, at the first disagreement.
    """

    def __init__(
        self,
        config: ParityConfig,
        criterion: Criterion,
        *,
        total_steps: int,
        seed: int,
        class_counts: Tensor | Sequence[int] | None = None,
        by_row: bool = True,
    ) -> None:
        self.by_row = by_row
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.weight = criterion.weight(torch.float64, torch.device("cpu"))
        self.ignore_index = criterion.ignore_index
        self.label_smoothing = criterion.label_smoothing
        self.formulations = {
            name: _with_options_of(criterion, name, class_counts) for name in config.formulations
        }
        self.worst = {name: Agreement() for name in self.formulations}
        self.mass_error = 0.0
        self.global_error = 0.0
        self.sums_agree = True
        self.followed = Followed()
        self.trained_ratio = 0.0
        """Largest error of the loss that trains over the oracle's bound: above 1 it is another
        function."""
        self.steps = 0
        # Lightning's own count is an expensive look, once per step.
        self._step = 0
        self._seen: Seen | None = None
        self._watch: Watch | None = None

    @classmethod
    def of_run(
        cls,
        config: Config,
        criterion: Criterion,
        class_counts: Tensor,
        total_steps: int,
        *,
        by_row: bool,
    ) -> ParityMonitor | None:
        """The monitor that a configuration asks for, or None."""
        if config.task != "fit" or config.parity.every_n_steps == 0:
            return None
        return cls(
            config.parity,
            criterion,
            total_steps=total_steps,
            seed=config.seed,
            class_counts=class_counts,
            by_row=by_row,
        )

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Note where training goes on: each batch is a step."""
        self._step = pl_module.global_step

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, batch: Batch, batch_idx: int
    ) -> None:
        """Watch the gradient of a parity step from here on."""
        step, self._step = self._step, self._step + 1
        if step % self.config.every_n_steps == 0 or step == self.total_steps - 1:
            self._watch = Watch(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:  # type: ignore[override]
        """Keep what this step saw: the optimizer may change the head, or the loss itself."""
        if self._watch is None:
            return
        accumulated = pl_module.step.accumulated
        if accumulated is not None:
            criterion = pl_module.criterion
            if any(True for _ in criterion.parameters()):
                criterion = copy.deepcopy(criterion)
            self._seen = Seen(accumulated.outputs.snapshot(), accumulated.target, criterion)
            if self.by_row:
                self._watch.forward_again(self._seen.outputs)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, outputs: Mapping[str, StepOutcome], *_: Any
    ) -> None:
        """Check this step, if it is a parity step."""
        if self._watch is None:
            return
        if self._seen is not None:
            step = pl_module.global_step - 1
            outcome, rank = outputs["outcome"], trainer.global_rank
            scalars = self.check(self._seen, outcome, step, rank, self._watch)
            self._seen = None
            pl_module.record(scalars, step)
        self._watch.close()
        self._watch = None

    def check(
        self, seen: Seen, outcome: StepOutcome, step: int, rank: int, watch: Watch | None = None
    ) -> dict[str, float]:
        """Compare one step's logits, and its gradient if it was watched.

        Every rank must call it. Returns the logged scalars.
        """
        # A loss that takes features spares the logits in every other step.
        logits = seen.outputs.logits()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        number = (self.seed << 40) + (step << 16) + rank
        generator = torch.Generator().manual_seed(number % 2**64)
        unit_normal = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        both = torch.cat([logits, unit_normal.to(logits.device)])
        rows = self._with_oracle(both, torch.cat([seen.target, seen.target]))

        scalars, disagreeing, trained = self._compare_formulations(seen.criterion, rows)
        mass_error, mass_agrees = sums.mass_error(
            self.formulations.values(), outcome, rows, weighted=self.weight is not None
        )
        global_error, global_agrees = sums.global_error(outcome, seen)
        scalars["parity/global_error"] = global_error
        self.mass_error = max(self.mass_error, mass_error)
        self.global_error = max(self.global_error, global_error)
        self.sums_agree = self.sums_agree and mass_agrees and global_agrees
        if not mass_agrees:
            disagreeing.append(f"the mass (off by {mass_error:.3g})")
        if not global_agrees:
            disagreeing.append(f"the all-reduced loss (off by {global_error:.3g} nats)")
        if watch is not None:
            exact, known = rows.exact.first(rows.batch), trained is not None and trained <= 1
            arrived = watch.follow(seen.outputs, seen.target, seen.criterion, exact, known=known)
            followed = watch.conclude(arrived, outcome)
            self.followed = self.followed.worst(followed)
            scalars |= {f"parity/{name}": value for name, value in followed._asdict().items()}
            disagreeing += followed.disagreeing()
        self.steps += 1
        if disagreeing:
            message = f"parity, step {step}: {', '.join(disagreeing)}: not what is right"
            if self.config.policy == "raise":
                raise ParityError(message)
            if self.config.policy == "warn":
                log.warning(message)
        return scalars

    def _compare_formulations(
        self, trained: Criterion, rows: Rows
    ) -> tuple[dict[str, float], list[str], float | None]:
        """Scalars of each formulation, which disagree, and the ratio of the loss that trains."""
        scalars: dict[str, float] = {}
        disagreeing = []
        compared = list(self.formulations.values())
        place = None
        if not trained.signature.wants_features:
            twins = (at for at, each in enumerate(compared) if same_function(each, trained))
            place = next(twins, len(compared))
            compared += [trained] * (place == len(compared))
        agreements = compare(compared, rows)
        for name, agreement in zip(self.formulations, agreements, strict=False):
            self.worst[name].add(agreement)
            scalars |= {
                f"parity/{name}/loss_error": agreement.loss_error,
                f"parity/{name}/grad_error": agreement.grad_error,
                f"parity/{name}/ratio": agreement.ratio,
                f"parity/{name}/nonfinite": float(agreement.nonfinite),
            }
            if not agreement.agree:
                disagreeing.append(f"{name} (error {agreement.ratio:.3g} times its bound)")
        scalars["parity/max_ratio"] = max(scalars[f"parity/{n}/ratio"] for n in self.formulations)
        ratio = None if place is None else agreements[place].ratio
        self.trained_ratio = max(self.trained_ratio, ratio or 0.0)
        return scalars, disagreeing, ratio

    def summary(self) -> dict[str, Any]:
        """The verdict so far, as `results.json` holds it."""
        per_formulation = {name: asdict(worst) for name, worst in self.worst.items()}
        return {
            **per_formulation,
            "mass_error": self.mass_error,
            "global_error": self.global_error,
            **self.followed._asdict(),
            "trained_ratio": self.trained_ratio,
            "steps": self.steps,
            "agree": self.sums_agree
            and not self.followed.disagreeing()
            and all(worst.agree for worst in self.worst.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        return self.summary() | {"sums_agree": self.sums_agree}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.worst = {
            name: Agreement(**state_dict[name]) if name in state_dict else Agreement()
            for name in self.formulations
        }
        self.mass_error = state_dict["mass_error"]
        self.global_error = state_dict["global_error"]
        self.sums_agree = state_dict["sums_agree"]
        # Earlier versions did not follow the gradient.
        self.followed = Followed(*(state_dict.get(name, 0.0) for name in Followed._fields))
        self.trained_ratio = state_dict.get("trained_ratio", 0.0)
        self.steps = state_dict["steps"]

    def _with_oracle(self, logits: Tensor, target: Tensor) -> Rows:
        # The weights come from the configuration, not from the criterion under test.
        exact = oracle.cross_entropy(
            logits,
            target,
            weight=None if self.weight is None else self.weight.to(logits.device),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return Rows(logits, target, exact)


def _with_options_of(
    criterion: Criterion, name: str, class_counts: Tensor | Sequence[int] | None
) -> Criterion:
    """The formulation `name` with the run's weights, smoothing and ignored rows."""
    if name == criterion.name == "custom":
        return criterion  # it has them, and its target is nowhere else
    options = criterion.options
    shared = {
        "weight": options.get("weight"),
        "ignore_index": options.get("ignore_index"),
        "label_smoothing": options.get("label_smoothing") or 0.0,
    }
    used = {key: value for key, value in shared.items() if value not in (None, 0.0)}
    if used.get("ignore_index") == -100:
        # PyTorch's default: every run has it, few have such rows.
        del used["ignore_index"]
    probe = Criterion(name, class_counts=class_counts)
    if probe.signature.wants_features:
        raise LossError(f"parity.formulations: {name!r} takes features, not logits; leave it out")
    for key in used:
        if key not in probe.signature.supported:
            raise LossError(
                f"parity.formulations: {name!r} has no {key}, which this run uses; leave it out"
            )
    formulation = Criterion(name, class_counts=class_counts, **used)
    if formulation.ignore_index == criterion.ignore_index:
        formulation.expect(ignored_rows=criterion.expected)
    return formulation
