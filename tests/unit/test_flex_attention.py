"""FlexAttention: the same results as dense attention, by its reference and compiled; slower than `test_masks.py`."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.distributed import flex
from tests.unit.test_masks import assert_later_tokens_change_nothing_earlier
from vlmvqa.sequence.rows import ATTENTION_PATTERNS


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
        found = vlm.decode(rows)[real]
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attention_pattern", "recomputed"), [*((pattern, False) for pattern in ATTENTION_PATTERNS), ("causal", True)]
)
def test_loss_and_gradients_are_those_of_dense_attention(attention_pattern: str, recomputed: bool) -> None:
    """Softcap, window, packed rows and padding included."""
    dense, vlm = flex.model("dense", attention_pattern), flex.model("flex", attention_pattern)
    if recomputed:
        vlm.checkpoint_activations()
    batch = flex.rows(vlm)
    with flex.flex_with_a_backward_pass():
        found = flex.loss_and_gradients(vlm, batch)
    flex.assert_equal(found, flex.loss_and_gradients(dense, batch))


@pytest.mark.slow
@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_compiled_flex_attention_is_dense_attention(attention_pattern: str) -> None:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    torch.compiler.reset()  # each shape is compiled as it is: on CPU, the kernel for changing shapes does not build
    compiled = torch._dynamo.utils.counters["aot_autograd"]
    compiled.clear()
    assert_flex_is_dense(attention_pattern)
    assert compiled.total() > 0, "nothing was compiled"
