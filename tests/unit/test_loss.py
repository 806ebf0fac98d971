"""The loss of supervised positions is the loss of all positions with ignored labels, in pieces or whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests import tiny
from vlmvqa.errors import InputError
from vlmvqa.models.build import language_config
from vlmvqa.models.language import LanguageModel
from vlmvqa.sequence.loss import divide_loss, supervised_loss


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


def test_weights_weigh() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(1, 4, 8)
    labels, weights = torch.tensor([[3, -100, 7, 9]]), torch.tensor([[0.5, 9.0, 0.0, 2.0]])
    total, divisor = supervised_loss(hidden, labels, head, weights=weights)
    each = F.cross_entropy(head(hidden[0]), labels[0], reduction="none")
    torch.testing.assert_close(total, 0.5 * each[0] + 2.0 * each[3])
    assert divisor == 2.5


def test_a_batch_may_weigh_less_than_one() -> None:
    """Only a divisor of 0 is replaced by 1, whether it is the batch's own weight or that of the global batch."""
    loss = torch.tensor(3.0)
    assert divide_loss(loss, torch.tensor(0.25), None) == 12
    assert divide_loss(loss, torch.tensor(2.0), torch.tensor(0.5)) == 6
    assert divide_loss(loss, torch.tensor(2.0), 4) == 0.75
    assert divide_loss(torch.tensor(0.0), torch.tensor(0.0), None) == 0


def test_the_fused_kernel_is_the_chunked_loss() -> None:
    """cut-cross-entropy's own reference on the CPU; its kernel in test_cuda.py. The softcap is prominent."""
    found = []
    for loss in ("chunked", "fused"):
        vlm = tiny.model(final_logit_softcapping=3.0)
        vlm.language.loss = loss
        batch = tiny.batch(vlm, [tiny.documents([2]), tiny.documents([1], seed=1)], tiny.images(2))
        batch["weights"][0] *= 0.25
        given = vlm(**batch)["loss"]
        given.backward()
        found.append((given.item(), {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None}))
        nothing = vlm(**(batch | {"labels": torch.full_like(batch["labels"], -100)}))["loss"]
        assert nothing == 0 and nothing.requires_grad
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_an_unknown_loss_is_an_error() -> None:
    with pytest.raises(InputError, match=r"model\.language\.loss=fusde is unknown"):
        LanguageModel(AutoModelForCausalLM.from_config(language_config(tiny.settings().language)), loss="fusde")
