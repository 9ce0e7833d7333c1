"""Mistakes that show under a transformation of torch."""

import torch
import torch.nn.functional as F


def other_when_compiled(logits, target, *, margin: float = 0.5):
    """What the compiler could not take was left out for it."""
    if not torch.compiler.is_compiling():
        own = torch.arange(logits.shape[-1]) == target.unsqueeze(-1)
        logits = torch.where(own, logits - margin, logits)
    return F.cross_entropy(logits, target, reduction="none")


class _LogSoftmax(torch.autograd.Function):
    """Log-softmax whose rule for vmap forgets that a batch dimension came first."""

    @staticmethod
    def forward(logits):
        return logits.log_softmax(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (log_p,) = ctx.saved_tensors
        return gradient - log_p.exp() * gradient.sum(-1, keepdim=True)

    @staticmethod
    def vmap(info, in_dims, logits):
        return logits.log_softmax(0), 0


def wrong_vmap(logits, target):
    return F.nll_loss(_LogSoftmax.apply(logits), target, reduction="none")
