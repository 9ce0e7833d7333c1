"""The contract of a loss as laws, each with a check that looks for a counter-example.

`verify` holds one loss against all of them. Checks run in the order of their dependence: what a
broken law would make meaningless is not run. A counter-example is made as small as it can be found:
fewest rows, fewest classes, roundest numbers.

>>> import torch
>>> def focal(logits, target, *, gamma: float = 2.0):
...     losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
...     return (1 - (-losses.detach()).exp()) ** gamma * losses
>>> print(verify(focal, gamma=1.0))
focal, gamma=1.0 BREAKS A LAW (25 laws: 11 hold, 1 broken, 13 not run)
<BLANKLINE>
gradient: The gradient is the derivative of the loss (float64, against central differences).
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64).requires_grad_()
    target = torch.tensor([0])
    losses = Criterion(focal, gamma=1.0).per_sample(logits, target)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    gradient: got [[-0.25, 0.25]], expected [[-0.423287, 0.423287]]
"""

from equiloss.conformance.trial import verify, verify_all
from equiloss.conformance.verdict import Conformance, Outcome, Status

__all__ = ["Conformance", "Outcome", "Status", "verify", "verify_all"]
