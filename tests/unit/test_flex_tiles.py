"""FlexAttention's tiles fit each GPU's shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.integrations import flex_attention

from tests import tiny
from vlmvqa.errors import InputError
from vlmvqa.models import flex_tiles
from vlmvqa.models.flex_tiles import BACKWARD, FORWARD, SCRATCH_BYTES, Tile, backward_bytes, choose, forward_bytes
from vlmvqa.models.interface import GenerationSettings

# The compute capability's first number, and bytes of shared memory per block (CUDA's programming guide).
GPUS = {"sm_80": (8, 166_912), "sm_86": (8, 101_376), "sm_89": (8, 101_376), "sm_90": (9, 232_448)}


def chosen(options: dict[str, int]) -> tuple[Tile, Tile]:
    forward, backward = (
        Tile(*(options[f"{kernel}_{name}"] for name in (*tokens, "num_stages", "num_warps")))
        for kernel, tokens in (("fwd", ("BLOCK_M", "BLOCK_N")), ("bwd", ("BLOCK_N1", "BLOCK_M1")))
    )
    assert (options["bwd_BLOCK_M2"], options["bwd_BLOCK_N2"]) == (backward.resident, backward.streamed)
    return forward, backward


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_the_chosen_tiles_fit(head_dim: int, dtype: torch.dtype, gpu: str) -> None:
    """The number of heads changes the number of blocks, not their memory."""
    major, available = GPUS[gpu]
    forward, backward = chosen(choose(head_dim, dtype, available, major))
    assert forward_bytes(forward, head_dim, dtype.itemsize, major) <= available
    assert backward_bytes(backward, head_dim, dtype.itemsize, major) <= available


def test_gemma_2_on_an_a10g() -> None:
    forward, backward = chosen(choose(256, torch.bfloat16, *reversed(GPUS["sm_86"])))
    assert forward == Tile(32, 64, 2) and backward == Tile(32, 32, 2)


def test_gpus_that_were_not_compared_have_small_tiles() -> None:
    """On sm_100 the backward kernel would take 266,816 bytes for 64 tokens, and it has 232,448."""
    forward, backward = chosen(choose(256, torch.bfloat16, 232_448, 10))
    assert max(forward.resident, backward.resident) < 64


def test_tiles_divide_the_blocks_of_the_mask_and_each_other() -> None:
    """As the kernels assert: 128 is the block size of `create_block_mask`."""
    assert all(128 % tile.resident == 128 % tile.streamed == 0 for tile in (*FORWARD, *BACKWARD))
    assert all(tile.resident % tile.streamed == 0 for tile in BACKWARD)


def test_the_bytes_of_inductors_default_tiles() -> None:
    assert forward_bytes(Tile(32, 64, 3), 256, 2, mask_bytes=0) == 151_552
    assert backward_bytes(Tile(64, 64, 1), 256, 2) == 114_688


# Bytes that Triton 3.9 allocates for the kernels that torch 2.15 generates with our mask and a softcap.
SM_80_TO_90 = [
    (forward_bytes, Tile(32, 64, 3), 256, 155_648),
    (forward_bytes, Tile(32, 64, 2), 256, 88_064),
    (forward_bytes, Tile(32, 64, 2), 96, 47_104),
    (backward_bytes, Tile(32, 32, 2), 256, 70_912),
    (backward_bytes, Tile(32, 32, 2), 192, 70_912),
]
HOPPER = [
    (forward_bytes, Tile(128, 64, 3, warps=8), 128, 135_168),
    (forward_bytes, Tile(64, 64, 3), 64, 61_440),
    (backward_bytes, Tile(128, 64, 3, warps=8), 128, 168_960),
    (backward_bytes, Tile(64, 64, 2, warps=8), 256, 199_168),
]
BELOW_THE_BOUND = [
    (forward_bytes, Tile(128, 64, 3, warps=8), 128, 2, 102_400),
    (forward_bytes, Tile(16, 16, 2), 256, 4, 50_816),
    (forward_bytes, Tile(32, 32, 2), 256, 4, 103_936),
    (backward_bytes, Tile(64, 64, 2, warps=8), 128, 2, 72_192),
    (backward_bytes, Tile(16, 16, 2), 256, 2, 37_504),
    (backward_bytes, Tile(16, 16, 2), 256, 4, 82_432),
    (backward_bytes, Tile(32, 32, 2), 256, 4, 148_480),
]


def test_the_arithmetic_is_what_triton_allocates() -> None:
    for cases, major in ((SM_80_TO_90, 8), (SM_80_TO_90, 9), (HOPPER, 9)):
        for count, tile, head_dim, allocated in cases:
            assert count(tile, head_dim, 2, major) == allocated, (tile, major)
    for count, tile, head_dim, itemsize, allocated in BELOW_THE_BOUND:
        assert allocated <= count(tile, head_dim, itemsize) + SCRATCH_BYTES[itemsize], tile


def test_a_gpu_on_which_no_tile_fits_is_refused() -> None:
    with pytest.raises(InputError, match=r"width 256 in float32.*has 49,152; use model.language.attention=dense"):
        choose(256, torch.float32, 49_152, 8)


def test_under_autocast_the_computed_type_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        major, shared_memory_per_block_optin = 8, 101_376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    states = torch.zeros(1)
    assert flex_tiles.kernel_options(256, states) == choose(256, torch.float32, 101_376, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert flex_tiles.kernel_options(256, states) == choose(256, torch.bfloat16, 101_376, 8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_options_reach_every_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.model(family=family)
    vlm.language.set_attention("flex")
    options = {"kernel_options": {"fwd_BLOCK_M": 16}}
    given = []

    def record(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        given.append(named["kernel_options"])
        return torch.zeros_like(query)

    monkeypatch.setattr(vlm.language, "_kernel_options", lambda _: options)
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", record)
    rows = tiny.batch(vlm, [tiny.documents([2])], tiny.images(1))
    vlm.checkpoint_activations()
    vlm.train().decode(rows)
    assert given == [options["kernel_options"]] * len(vlm.language.blocks)


def test_on_a_cpu_no_options_are_passed() -> None:
    vlm = tiny.model()
    vlm.language.set_attention("flex")
    assert vlm.language._kernel_options(torch.zeros(1)) == {}


def test_flex_attention_takes_no_cache() -> None:
    """So that its decoding kernel is never used: `choose` selects the general one for short rows."""
    vlm = tiny.model()
    rows = tiny.batch(vlm, [tiny.without_answers(tiny.documents([2]))], tiny.images(1))
    vlm.language.set_attention("flex")
    with pytest.raises(InputError, match="does not support a cache"):
        vlm.decode(rows, DynamicCache())
    vlm.generate(rows, [tiny.EOS], GenerationSettings(max_new_tokens=2))  # with dense attention
    assert vlm.attention == "flex"
