"""What a training step has to compute, counted from the model's shapes and the batch; and what the device can compute.

As in PaLM (Chowdhery et al. 2022, appendix B), model FLOPs utilisation is the first over the second: the operations
that the model needs, however it is run. A matrix takes 2 for each of its numbers a token forward, and in the backward
pass 2 for its gradient and 2 for its input's; attention takes 4 x heads x head_dim for each pair of tokens forward, and
twice that backward; norms, softmax and the embedding's lookup take none; recomputed activations are not counted twice.

Unlike PaLM's formula, the vision encoder counts; pairs count only where one token sees the other; padding does not
count; the output head only at supervised tokens; and in the backward pass only gradients that are made, so nothing
in a frozen encoder and no gradients of frozen weights. What the device can do is measured, not taken from its maker.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from vlmvqa.models.language import LanguageModel
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.models.vlm import VLM, Batch
from vlmvqa.sequence.masks import ATTENTION_PATTERNS, NONE
from vlmvqa.sequence.rows import IGNORE, IMAGE, PADDING, PROMPT

COUNTED = ("questions", "supervised_tokens", "tokens", "pairs", "local_pairs")


def count(batch: Batch, attention_pattern: str, window: int | None = None) -> Tensor:
    """What a batch holds, `int64[5]` in the order of `COUNTED`, without asking the device for a number.

    `pairs` are those of a token and one it sees, itself included: exact, from each token alone. Positions run on from
    the image as if a question were alone, so position + 1 tokens are seen backwards. In a bidirectional block that
    begins at position s, those seen forwards are, over the whole block, as many as those seen backwards: position - s.

    Args:
        attention_pattern: a key of `masks.ATTENTION_PATTERNS`.
        window: of local layers (None: `local_pairs` are the others).
    """
    role, position, real = batch["role"], batch["position"], batch["document"] != PADDING
    supervised = batch["labels"] != IGNORE
    back = position + 1
    ahead = torch.zeros_like(position)
    blocks = ATTENTION_PATTERNS[attention_pattern]
    for kind, block in enumerate(blocks):
        if block != NONE:
            # A question's own block begins where the image has ended: at the number of tokens of any image.
            begin = 0 if block == blocks[IMAGE] else position.where(role == IMAGE, -1).amax() + 1
            ahead = torch.where(role == kind, position - begin, ahead)
    local = back if window is None else back.clamp(max=window)
    found = (supervised & (role == PROMPT), supervised, real, (back + ahead) * real, (local + ahead) * real)
    return torch.stack([column.sum() for column in found])


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward and backward pass.

    Attributes:
        encoded: of an image through the encoder.
        image: of an image through the projector.
        token: of a token through the decoder's matrices.
        supervised: of a supervised token through the output head.
        pair, local_pair: of a pair of tokens that see each other, in all global and all local layers.
    """

    encoded: int
    image: int
    token: int
    supervised: int
    pair: int
    local_pair: int

    def of(self, counts: Mapping[str, int]) -> int:
        """Of everything counted."""
        return (
            self.encoded * counts["encoded"]
            + self.image * counts["images"]
            + self.token * counts["tokens"]
            + self.supervised * counts["supervised_tokens"]
            + self.pair * counts["pairs"]
            + self.local_pair * counts["local_pairs"]
        )


def count_flops(vlm: VLM) -> Flops | None:
    """From the modules' shapes and what trains; None for experts, of which a token meets only some."""
    if any(parameter.ndim > 2 for parameter in vlm.language.decoder.parameters()):
        return None
    # In the order of the forward pass: a gradient flows back only as far as there is something upstream that trains.
    encoded, flows = _encoder(vlm.vision)
    image = 0
    for layer in vlm.projector.layers:
        image += vlm.vision.num_image_tokens * _matrices(layer, flows)
        flows |= _trains(layer)
    return Flops(encoded, image, *_language(vlm.language, flows))


def _encoder(vision: VisionEncoder) -> tuple[int, bool]:
    """Of an image, and whether the projector makes a gradient for what comes out."""
    encoder = vision.encoder
    patches = encoder.patch_embed.num_patches
    tokens = patches + encoder.num_prefix_tokens
    total = patches * _matrices(encoder.patch_embed, False)  # no gradient for pixels
    flows = _trains_before(encoder, vision)
    for block in vision.blocks:
        flows |= _trains(block)
        total += tokens * _matrices(block, flows) + tokens**2 * _attention(vision.width, flows)
    return total, flows | _trains(vision.final_norm)


def _language(language: LanguageModel, flows: bool) -> tuple[int, int, int, int]:
    """Of a token, a supervised token, a pair in global layers and one in local layers."""
    config, embedding = language.config, language.decoder.get_input_embeddings()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    flows |= _trains_before(language.decoder, language)
    token, pairs = 0, {"full_attention": 0, "sliding_attention": 0}
    for layer, kind in zip(language.blocks, _layer_kinds(language), strict=True):
        flows |= _trains(layer)
        token += _matrices(layer, flows)
        pairs[kind] += _attention(width, flows)
    flows |= _trains(language.final_norm)
    words = embedding.num_embeddings if language.head is None else language.head.out_features
    trains = (language.head or embedding).weight.requires_grad
    supervised = 2 * words * language.width * (1 + trains + flows)
    return token, supervised, pairs["full_attention"], pairs["sliding_attention"]


def _matrices(part: nn.Module, flows: bool) -> int:
    """Of a token, or a patch, through all matrices of a part.

    Args:
        flows: whether a gradient is made for what goes in.
    """
    total = 0
    for module in part.modules():
        if isinstance(module, nn.Linear):
            numbers = module.in_features * module.out_features  # not the weight's shape: ZeRO-3 keeps it elsewhere
        elif isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            numbers = module.in_channels // module.groups * module.out_channels * kernel
        else:
            continue
        total += 2 * numbers * (1 + module.weight.requires_grad + flows)
    return total


def _attention(width: int, flows: bool) -> int:
    """Of a pair of tokens in one layer: scores and weighted values, and what their gradients are made of."""
    return 4 * width * (1 + 2 * flows)


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _trains_before(whole: nn.Module, part: VisionEncoder | LanguageModel) -> bool:
    """Whether anything of an encoder or decoder trains that comes before its blocks."""
    after = {id(parameter) for module in (*part.blocks, part.final_norm) for parameter in module.parameters()}
    return any(parameter.requires_grad for parameter in whole.parameters() if id(parameter) not in after)


def _layer_kinds(language: LanguageModel) -> list[str]:
    """Which of the two masks each decoder layer gets (`LanguageModel._masks`)."""
    kinds = getattr(language.config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    local = getattr(language.config, "sliding_window", None) is not None
    return ["sliding_attention" if local else "full_attention"] * len(language.blocks)


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the device's best matrix product, measured once a process, in a fraction of a second."""
    best = 0.0
    for size in (8192,) if device.type == "cuda" else (512, 1024, 2048):
        operations = 2 * size**3
        if best and operations / best > 0.2:  # a CPU that computes this type slowly
            break
        # Numbers of their own generator: the run's would be others than without this.
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
