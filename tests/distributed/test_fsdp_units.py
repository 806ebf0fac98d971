"""FSDP2's units: blocks, embedding and the rest."""

from __future__ import annotations

import pytest

from tests import forks


@pytest.mark.slow
def test_loss_gradients_and_gathers_of_every_setting() -> None:
    """Equal to ranks that are not sharded, with a tied head, an untied one, and one that shares the embedding."""
    process = forks.ranks(2, ["-m", "tests.distributed.fsdp_units"])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
