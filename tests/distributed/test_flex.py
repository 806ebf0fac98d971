"""FlexAttention under FSDP2."""

from __future__ import annotations

import pytest

from tests import forks


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_under_fsdp_equal_dense_attention(count: int) -> None:
    process = forks.ranks(count, ["-m", "tests.distributed.flex"])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
