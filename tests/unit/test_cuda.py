"""Tests that need a GPU: `python -m pytest tests/unit/test_cuda.py` on a machine that has one."""

from __future__ import annotations

import pytest
import torch

from tests import tiny

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: FlexAttention has no backward pass on the CPU"
)
# Questions per image of each packed row; row lengths are rounded to FlexAttention's blocks.
ROWS = [[1, 5, 3], [2, 2], [7], [4, 1, 1, 3]]


def loss_and_gradients(attention: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vlm = tiny.model(head_dim=16).to("cuda", dtype).train()
    vlm.language.set_attention(attention)
    given = tiny.documents([count for row in ROWS for count in row])
    rows, start = [], 0
    for row in ROWS:
        rows.append(given[start : start + len(row)])
        start += len(row)
    batch = tiny.batch(vlm, rows, tiny.images(len(given)), multiple=128)
    loss = vlm(**{name: column.to("cuda") for name, column in batch.items()})["loss"]
    loss.backward()
    return loss.detach().float(), {n: p.grad.float() for n, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_flex_attention_equals_dense_attention_forward_and_backward(dtype: torch.dtype, tolerance: float) -> None:
    dense, flex = (loss_and_gradients(attention, dtype) for attention in ("dense", "flex"))
    assert flex[0].item() == pytest.approx(dense[0].item(), rel=tolerance)
    assert flex[1].keys() == dense[1].keys()
    for name, gradient in dense[1].items():
        error = (flex[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_the_fused_loss_equals_the_chunked_loss(dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for loss in ("chunked", "fused"):
        vlm = tiny.model(head_dim=16, vocab_size=512, final_logit_softcapping=3.0).to("cuda", dtype).train()
        vlm.language.loss = loss
        batch = tiny.batch(vlm, [tiny.documents([3]), tiny.documents([2], seed=1)], tiny.images(2))
        given = vlm(**{name: column.to("cuda") for name, column in batch.items()})["loss"]
        given.backward()
        found.append((given.item(), {n: p.grad.float() for n, p in vlm.named_parameters() if p.grad is not None}))
    assert found[1][0] == pytest.approx(found[0][0], rel=tolerance)
    for name, gradient in found[0][1].items():
        error = (found[1][1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.2e}"
