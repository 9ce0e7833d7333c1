"""All laws, in the order in which they are checked and reported."""

from __future__ import annotations

from equiloss.conformance import derivatives, heads, keywords, precision, rows, targets, transforms
from equiloss.conformance.law import Law
from equiloss.conformance.ranks import ranks

# What a law needs stands before it.
LAWS: tuple[Law, ...] = (
    *(rows.loads, rows.shape, rows.finite, rows.sizes, rows.pure, rows.repeatable),
    *(rows.attached, rows.unreduced, rows.independence),
    *(derivatives.gradient, derivatives.parameters, heads.head),
    *(derivatives.extremes, derivatives.shift),
    keywords.options,
    *(targets.soft_targets, targets.label_smoothing, targets.weight),
    *(targets.ignored_rows, targets.combinations),
    *(precision.promotion, precision.accuracy),
    *(transforms.per_sample_gradients, transforms.compiled),
    ranks,
)
