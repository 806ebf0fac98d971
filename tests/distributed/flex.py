"""FlexAttention with a backward pass on the CPU, and a program that compares it with dense attention under FSDP2.

python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.flex
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from tests import tiny
from vlmvqa.config.schema import DistSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.training import distributed

LAYERS = {"num_hidden_layers": 2, "head_dim": 16}  # a local and a global layer


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, backend="aot_eager")


@contextmanager
def flex_with_a_backward_pass() -> Iterator[None]:
    """Allow FlexAttention gradients on the CPU: inductor has no backward kernel for it, other backends need none."""
    with (
        patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None),
        patch.object(WrappedFlexAttention, "__call__", lambda _: _compiled()),
    ):
        yield


def model(attention: str, attention_pattern: str = "blockwise_prefix") -> VLM:
    vlm = tiny.model(attention_pattern, **LAYERS).train()
    vlm.language.set_attention(attention)
    return vlm


def rows(vlm: VLM, seed: int = 0) -> dict[str, Tensor]:
    """A row of two images with several questions, longer than the window; a short row; a row of padding."""
    counts = [1, 1, 1] if vlm.attention_pattern == "prefix_lm" else [3, 4, 2]
    given = tiny.documents(counts, seed)
    batch = tiny.batch(vlm, [given[:2], given[2:]], tiny.images(3, seed), multiple=128)
    pixels = batch.pop("pixel_values")
    padded = {name: torch.cat([column, column[1:, -1:].expand(1, 128)]) for name, column in batch.items()}
    return {"pixel_values": pixels, **padded}


def loss_and_gradients(vlm: VLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and each parameter's gradient, of all ranks together if it is sharded."""
    loss = vlm(**batch)["loss"]
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in vlm.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def assert_equal(flex: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    assert flex.keys() == dense.keys() and len(flex) > 30
    for name, expected in dense.items():
        torch.testing.assert_close(flex[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def main() -> None:
    """Compare FSDP2's gradients under FlexAttention with the mean of every rank's dense gradients."""
    dist.init_process_group("gloo")
    batches = [rows(model("dense"), seed) for seed in range(dist.get_world_size())]
    apart = [loss_and_gradients(model("dense"), batch) for batch in batches]
    mean = {name: torch.stack([found[name] for found in apart]).mean(0) for name in apart[0]}
    vlm = model("flex")
    vlm.checkpoint_activations()
    distributed.shard(vlm, torch.device("cpu"), None, DistSettings("fsdp"))
    with flex_with_a_backward_pass():
        sharded = loss_and_gradients(vlm, batches[dist.get_rank()])
    assert_equal(sharded, mean | {"loss": apart[dist.get_rank()]["loss"]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
