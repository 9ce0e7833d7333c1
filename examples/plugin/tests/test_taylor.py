"""The loss keeps every law of equiloss, and the identities that it is known by."""

import pytest
import torch
import torch.nn.functional as F
from equiloss_taylor import taylor_cross_entropy

from equiloss.testing import assert_loss_conforms

LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.arange(8) % 3


@pytest.mark.parametrize("order", [1, 2, 6])
def test_it_conforms(order: int) -> None:
    assert_loss_conforms(taylor_cross_entropy, order=order)


def test_one_term_is_the_mean_absolute_error() -> None:
    p = LOGITS.softmax(-1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(taylor_cross_entropy(LOGITS, TARGET, order=1), 1 - p)


def test_many_terms_are_cross_entropy() -> None:
    found = taylor_cross_entropy(LOGITS, TARGET, order=2000)
    # What is cut off is at most (1 - p)^2001 / p, and p is at least 0.02 here.
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, TARGET, reduction="none"))


def test_an_order_without_terms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.order must be at least 1, got 0"):
        taylor_cross_entropy(LOGITS, TARGET, order=0)
