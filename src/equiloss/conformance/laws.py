"""All laws, in the order in which they are checked and reported."""

from __future__ import annotations

from equiloss.conformance.derivatives import extremes, gradient, parameters, shift
from equiloss.conformance.heads import head
from equiloss.conformance.keywords import options
from equiloss.conformance.law import Law
from equiloss.conformance.precision import accuracy, promotion
from equiloss.conformance.ranks import ranks
from equiloss.conformance.rows import (
    attached,
    finite,
    independence,
    loads,
    pure,
    repeatable,
    shape,
    sizes,
    unreduced,
)
from equiloss.conformance.targets import (
    combinations,
    ignored_rows,
    label_smoothing,
    soft_targets,
    weight,
)
from equiloss.conformance.transforms import compiled, per_sample_gradients

# What a law needs stands before it.
LAWS: tuple[Law, ...] = (
    *(loads, shape, finite, sizes, pure, repeatable, attached, unreduced, independence),
    *(gradient, parameters, head, extremes, shift),
    options,
    *(soft_targets, label_smoothing, weight, ignored_rows, combinations),
    *(promotion, accuracy),
    *(per_sample_gradients, compiled),
    ranks,
)
