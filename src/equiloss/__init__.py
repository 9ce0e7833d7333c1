"""Image classification in which the loss is a plugin and "it is the same number" is a guarantee.

>>> import tempfile, torch
>>> from equiloss import compose, fit, load
>>> done = fit(compose("debug=fast", "callbacks=quiet", "logger=csv"), tempfile.mkdtemp() + "/run")
>>> done.result.status, sorted(done.metrics)[:2]
('completed', ['parity/cross_entropy/grad_error', 'parity/cross_entropy/loss_error'])
>>> model = load(done)  # and model.predict(["one.png", "two.jpg"]).labels
>>> model.predict(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).probabilities.shape
torch.Size([3, 10])
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
