"""Mistakes about targets and weights."""

import torch
import torch.nn.functional as F


def soft_mean(logits, target):
    """Probabilities are averaged over the classes, not summed."""
    if target.is_floating_point():
        return F.kl_div(logits.log_softmax(-1), target, reduction="none").mean(-1)
    return F.cross_entropy(logits, target, reduction="none")


soft_mean.soft_targets = True


def falsy_smoothing(logits, target, *, label_smoothing: float = 0.0):
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing or 0.1)


def other_classes(logits, target, *, label_smoothing: float = 0.0):
    """ε is spread over the other C - 1 classes, which is another mixture."""
    classes = logits.shape[-1]
    if not target.is_floating_point():
        target = F.one_hot(target, classes).to(logits.dtype)
    rest = (1 - target) / (classes - 1)
    mixed = (1 - label_smoothing) * target + label_smoothing * rest
    return F.cross_entropy(logits, mixed, reduction="none")


other_classes.soft_targets = True


def normalised_weight(logits, target, *, weight=None):
    losses = F.cross_entropy(logits, target, weight, reduction="none")
    return losses if weight is None else losses * len(weight) / weight.sum()


def predicted_weight(logits, target, *, weight=None):
    """The weight of the class that was predicted."""
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses if weight is None else weight[logits.argmax(-1)] * losses


def smoothed_ignored(logits, target, *, ignore_index: int = -100, label_smoothing: float = 0.0):
    """The part of the target that is spread over all classes is there for ignored rows too."""
    nll = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    uniform = -logits.log_softmax(-1).mean(-1)
    return (1 - label_smoothing) * nll + label_smoothing * uniform


def fixed_ignored(logits, target, *, ignore_index: int = -100):
    return F.cross_entropy(logits, target.clamp(min=-100), reduction="none")


def soft_batch_weight(logits, target, *, weight=None):
    """With probabilities, the weights are measured by the batch that happens to be there."""
    losses = F.cross_entropy(logits, target, weight, reduction="none")
    if weight is None or not target.is_floating_point():
        return losses
    return losses / (target.detach() @ weight).mean()


soft_batch_weight.soft_targets = True

_ = torch
