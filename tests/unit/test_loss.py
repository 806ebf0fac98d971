"""The loss of supervised positions is the loss of all positions with ignored labels, in pieces or whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlmvqa.sequence.loss import supervised_loss


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_it_is_the_full_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(2, 9, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 9)).masked_fill(torch.rand(2, 9) < 0.5, -100)
    total, count = supervised_loss(hidden, labels, head, chunk)
    total.backward()
    gradients = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    assert count == (labels != -100).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients, [hidden.grad, head.weight.grad])


def test_nothing_supervised_is_a_zero_with_a_graph() -> None:
    """A rank without a label must still take part in the backward pass."""
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    total, count = supervised_loss(hidden, torch.full((1, 4), -100), head)
    total.backward()
    assert total == 0 and count == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()
