"""Floating-point operations of a training step, and of what the device can compute per second.

As in PaLM (Chowdhery et al. 2022, appendix B), model FLOPs utilisation is the operations that the model needs, however
it is run, over what the device can compute. Per token, a matrix takes 2 operations per element in the forward pass; in
the backward pass 2 for its gradient and 2 for its input's. Per pair of tokens, attention takes 4 x heads x head_dim
forward, and twice that backward. Norms, softmax and the embedding's lookup take none. Recomputed activations are not
counted twice.

Unlike PaLM's formula, the vision encoder is counted; pairs are counted only if one token sees the other; padding is not
counted; the output head is counted only at supervised tokens; and the backward pass counts only gradients that are
computed: nothing in a frozen encoder, and no gradients of frozen weights. The device's rate is measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from vlmvqa.models.language import LanguageModel
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.sequence.rows import IGNORE, NONE, PADDING, PROMPT, Batch

COUNTED = ("questions", "supervised_tokens", "tokens", "pairs", "local_pairs")


def count(batch: Batch, window: int | None = None) -> Tensor:
    """Count the contents of a batch: `int64[5]` in the order of `COUNTED`, without a synchronization of the device.

    `pairs` are those of a token and one that it sees, itself included; the count is exact and computed from each token
    alone. The positions of a question continue those of the image, so that position + 1 tokens are seen backwards. In a
    bidirectional block that begins at position s, as many are seen forwards, over all of the block, as backwards:
    position - s.

    Args:
        window: number of positions that local layers see back (None: `local_pairs` equals `pairs`).
    """
    block, position, real = batch["block"], batch["position"], batch["document"] != PADDING
    supervised = batch["labels"] != IGNORE
    # The tokens of a block follow each other: it begins where the block changes, or positions restart.
    begins = torch.ones_like(real)
    begins[:, 1:] = (block[:, 1:] != block[:, :-1]) | (position[:, 1:] != position[:, :-1] + 1)
    begin = torch.where(begins, torch.arange(block.shape[1], device=block.device), 0).cummax(1).values
    back = position + 1
    ahead = torch.where(block == NONE, 0, position - position.gather(1, begin))
    local = back if window is None else back.clamp(max=window)
    questions = supervised & (batch["role"] == PROMPT)
    found = (questions, supervised, real, (back + ahead) * real, (local + ahead) * real)
    return torch.stack([column.sum() for column in found])


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward and backward pass.

    Attributes:
        encoded: per image, in the encoder.
        image: per image, in the projector.
        token: per token, in the decoder's matrices.
        supervised: per supervised token, in the output head.
        pair, local_pair: per pair of tokens that see each other, in all global and all local layers.
    """

    encoded: int
    image: int
    token: int
    supervised: int
    pair: int
    local_pair: int

    def of(self, counts: Mapping[str, int]) -> int:
        """Return the operations for the given counts."""
        return (
            self.encoded * counts["encoded"]
            + self.image * counts["images"]
            + self.token * counts["tokens"]
            + self.supervised * counts["supervised_tokens"]
            + self.pair * counts["pairs"]
            + self.local_pair * counts["local_pairs"]
        )


def count_flops(vision: VisionEncoder, projector: Projector, language: LanguageModel) -> Flops | None:
    """Count operations from the modules' shapes and from which parameters train.

    Returns:
        None for a mixture of experts, whose tokens pass only some of the matrices, and for a vision encoder that is no
        plain transformer.
    """
    if any(parameter.ndim > 2 for parameter in language.decoder.parameters()):
        return None
    if not all(isinstance(tower.encoder, VisionTransformer | Eva) for tower in vision.towers):
        return None
    # In the order of the forward pass: a gradient flows back only if something before it trains.
    encoded, image, flows = 0, 0, False
    for tower in vision.towers:
        operations, trains = _encoder(tower)
        encoded, flows = encoded + operations, flows | trains
    for layer, tokens in projector.matrices():
        image += tokens * _matrices(layer, flows)
        flows |= _trains(layer)
    return Flops(encoded, image, *_language(language, flows))


def _encoder(vision: VisionEncoder) -> tuple[int, bool]:
    """Return the operations per image, and whether the projector computes a gradient for its input."""
    encoder = vision.encoder
    patches = encoder.patch_embed.num_patches
    tokens = patches + encoder.num_prefix_tokens
    total = patches * _matrices(encoder.patch_embed, False)  # no gradient for pixels
    flows = _trains_before(encoder, vision)
    for block in vision.blocks:
        flows |= _trains(block)
        total += tokens * _matrices(block, flows) + tokens**2 * _attention(encoder.embed_dim, flows)
    return total, flows | any(map(_trains, vision.final_norms))


def _language(language: LanguageModel, flows: bool) -> tuple[int, int, int, int]:
    """Return the operations per token, per supervised token, per pair in global and per pair in local layers."""
    config, embedding = language.config, language.decoder.get_input_embeddings()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    flows |= _trains_before(language.decoder, language)
    token, pairs = 0, {"full_attention": 0, "sliding_attention": 0}
    for layer, kind in zip(language.blocks, _layer_kinds(language), strict=True):
        flows |= _trains(layer)
        token += _matrices(layer, flows)
        pairs[kind] += _attention(width, flows)
    flows |= any(map(_trains, language.final_norms))
    words = embedding.num_embeddings if language.head is None else language.head.out_features
    trains = (language.head or embedding).weight.requires_grad
    supervised = 2 * words * language.width * (1 + trains + flows)
    return token, supervised, pairs["full_attention"], pairs["sliding_attention"]


def _matrices(part: nn.Module, flows: bool) -> int:
    """Return the operations per token or patch in all matrices of a part.

    Args:
        flows: whether a gradient is computed for the input.
    """
    total = 0
    for module in part.modules():
        if isinstance(module, nn.Linear):
            numbers = module.in_features * module.out_features  # not the weight's shape: under ZeRO-3 it is empty
        elif isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            numbers = module.in_channels // module.groups * module.out_channels * kernel
        else:
            continue
        total += 2 * numbers * (1 + module.weight.requires_grad + flows)
    return total


def _attention(width: int, flows: bool) -> int:
    """Return the operations per pair of tokens in one layer: scores, weighted values, and their gradients."""
    return 4 * width * (1 + 2 * flows)


def _trains(part: nn.Module) -> bool:
    """Return whether any parameter trains."""
    return any(parameter.requires_grad for parameter in part.parameters())


def _trains_before(network: nn.Module, part: VisionEncoder | LanguageModel) -> bool:
    """Return whether a parameter before the blocks of an encoder or decoder trains."""
    after = {id(parameter) for module in (*part.blocks, *part.final_norms) for parameter in module.parameters()}
    return any(parameter.requires_grad for parameter in network.parameters() if id(parameter) not in after)


def _layer_kinds(language: LanguageModel) -> list[str]:
    """Return the kind of mask of each decoder layer (`LanguageModel._masks`)."""
    kinds = getattr(language.config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    local = getattr(language.config, "sliding_window", None) is not None
    return ["sliding_attention" if local else "full_attention"] * len(language.blocks)


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of the device's best matrix product, once per process (under a second)."""
    best = 0.0
    for size in (8192,) if device.type == "cuda" else (512, 1024, 2048):
        operations = 2 * size**3
        if best and operations / best > 0.2:  # the CPU computes this type slowly
            break
        # A separate generator, so that the random numbers of the run stay the same.
        generator = torch.Generator(device).manual_seed(0)
        matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
        product = matrix @ matrix
        for _ in range(20 if device.type == "cuda" else 3):
            started = _synchronized(device)
            torch.matmul(matrix, matrix, out=product)
            best = max(best, operations / (_synchronized(device) - started))
    if device.type == "cuda":
        del matrix, product
        torch.cuda.empty_cache()
    return best


def _synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
