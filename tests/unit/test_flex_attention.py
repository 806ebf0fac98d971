"""FlexAttention: the same results as dense attention, by its reference and compiled; slower than `test_masks.py`."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.unit.test_masks import assert_later_tokens_change_nothing_earlier
from vlmvqa.sequence.masks import ATTENTION_PATTERNS


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_a_later_token_never_changes_an_earlier_one(attention_pattern: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # FlexAttention's reference, without a minute of compiling
        assert_later_tokens_change_nothing_earlier(attention_pattern, "flex")


def assert_flex_is_dense(attention_pattern: str) -> None:
    """Softcap and window included; rows of whole blocks, as a training has them."""
    vlm = tiny.model(attention_pattern)
    given = tiny.documents([2, 2])
    rows = tiny.batch(
        vlm, tiny.apart(given) if attention_pattern == "prefix_lm" else [given], tiny.images(2), multiple=128
    )
    real = rows["document"] >= 0
    with torch.no_grad():
        dense = vlm.decode(rows)[real]
        vlm.language.set_attention("flex")
        flex = vlm.decode(rows)[real]
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_flex_attention_is_dense_attention(attention_pattern: str) -> None:
    """FlexAttention's reference, which runs the mask without a compiler."""
    with torch.compiler.set_stance("force_eager"):
        assert_flex_is_dense(attention_pattern)


@pytest.mark.slow
@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_compiled_flex_attention_is_dense_attention(attention_pattern: str) -> None:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    torch.compiler.reset()  # each shape is compiled as it is: on CPU, the kernel for changing shapes does not build
    compiled = torch._dynamo.utils.counters["aot_autograd"]
    compiled.clear()
    assert_flex_is_dense(attention_pattern)
    assert compiled.total() > 0, "nothing was compiled"
