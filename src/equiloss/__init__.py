"""Image classification in which the loss is a plugin and "it is the same number" is a guarantee.

>>> from equiloss import compose, fit, load
>>> done = fit(compose("loss=focal", "trainer.max_epochs=5"))  # doctest: +SKIP
>>> load(done).predict(["a.png", "b.png"]).labels  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equiloss.launching.notebook import compose, fit
    from equiloss.prediction.model import load

__all__ = ["compose", "fit", "load"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and when it is: torch takes seconds that `--help` does without."""
    if name in ("compose", "fit"):
        from equiloss.launching import notebook

        return getattr(notebook, name)
    if name == "load":
        from equiloss.prediction.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
