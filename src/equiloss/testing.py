"""For tests of losses and reductions, here and in plugins.

`assert_loss_conforms` holds a loss against the laws of every loss; `run_ranks` calls a function in
real process groups on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equiloss.distributed.process_groups import run_ranks

__all__ = ["assert_loss_conforms", "run_ranks"]


def assert_loss_conforms(loss: str | Callable[..., Any], /, **options: Any) -> None:
    """Fail unless a loss keeps every law of `equiloss verify`; it takes some seconds.

    Args:
        loss: A registered name, `package.module:function`, a function, or an nn.Module class.
        **options: Values of its own options. An option `num_classes` fixes the number of classes
            for all laws.

    Raises:
        AssertionError: naming the first broken law, with the smallest counter-example found.
        LossError: for a name or an option that does not exist.

    >>> def summed(logits, target):
    ...     return logits.logsumexp(-1).sum()
    >>> assert_loss_conforms(summed)
    Traceback (most recent call last):
    AssertionError: summed BREAKS A LAW (25 laws: 1 hold, 1 broken, 23 not run)
    ...
    """
    __tracebackhide__ = True  # pytest then shows the caller's line
    # Imported here: a rank of `run_ranks` does without it.
    from equiloss.conformance import verify

    verdict = verify(loss, **options)
    if not verdict.holds:
        raise AssertionError(str(verdict))
