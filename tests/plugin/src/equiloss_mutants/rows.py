"""Mistakes about rows."""

import torch
import torch.nn.functional as F


def wrong_signature(prediction, target):
    return F.cross_entropy(prediction, target, reduction="none")


def scalar(logits, target):
    return F.cross_entropy(logits, target)


def column(logits, target):
    return -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1))


def always_float32(logits, target):
    return F.cross_entropy(logits.float(), target, reduction="none")


def needs_a_row(logits, target):
    return F.cross_entropy(logits - logits.max(), target, reduction="none")


def not_a_number(logits, target):
    """The margin of a misclassified row is negative, and its logarithm no number."""
    top = logits.topk(2, dim=-1).values
    own = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -(own - top[:, 1]).log()


def in_place(logits, target):
    if not logits.requires_grad:
        logits -= logits.amax(-1, keepdim=True)
    return F.cross_entropy(logits, target, reduction="none")


def in_place_target(logits, target, *, ignore_index: int = -100):
    ignored = target == ignore_index
    target[ignored] = 0
    return F.cross_entropy(logits, target, reduction="none").masked_fill(ignored, 0)


def noisy(logits, target):
    noise = 1e-3 * torch.randn_like(logits)
    return F.cross_entropy(logits + noise, target, reduction="none")


def mean_everywhere(logits, target):
    return F.cross_entropy(logits, target).expand(len(logits))


def divided_by_rows(logits, target):
    return F.cross_entropy(logits, target, reduction="none") / max(len(logits), 1)


def hard_examples(logits, target):
    """Only the harder half of the batch counts."""
    losses = F.cross_entropy(logits, target, reduction="none")
    if not len(losses):
        return losses
    return torch.where(losses >= losses.median(), losses, 0 * losses)
