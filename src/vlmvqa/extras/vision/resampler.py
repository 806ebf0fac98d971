"""A Perceiver resampler as in Idefics2 (Laurençon et al. 2024): learned latents attend to the image features.

Equal to transformers' `Idefics2PerceiverResampler` on the same weights.

Legend: I images, N tokens of an image in the features, M latents, Dv vision width, D language width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vlmvqa.errors import InputError
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import FeatureShape

EPS = 1e-6


class Resampler(Projector):
    """`float[I, N, Dv] -> float[I, M, D]`: a projection to width D, then blocks of attention to it and a gated MLP.

    Args:
        latents: M, the number of tokens of an image.
        depth: number of blocks.
        heads, key_value_heads, head_dim: of the attention; `heads` is a multiple of `key_value_heads`.
        layers: the projection, one of `projector.LAYERS`.
    """

    def __init__(
        self,
        features: FeatureShape,
        width: int,
        dropout: float = 0.0,
        latents: int = 64,
        depth: int = 3,
        heads: int = 16,
        key_value_heads: int = 4,
        head_dim: int = 96,
        layers: str = "linear",
    ) -> None:
        if min(latents, depth, key_value_heads, head_dim) < 1 or heads % key_value_heads:
            raise InputError(
                "model.projector.options: heads must be a multiple of key_value_heads, and every number at least 1; "
                f"heads={heads} and key_value_heads={key_value_heads} were given"
            )
        super().__init__(features, width, layers, dropout)
        self.output = FeatureShape(width, latents, None)
        self.num_features = features.tokens
        # Not all ones, as transformers' class has them before loading weights: equal latents would stay equal.
        self.latents = nn.Parameter(torch.randn(latents, width))
        blocks = [Block(width, heads, key_value_heads, head_dim) for _ in range(depth)]
        self.blocks: Iterable[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(width, EPS)

    def forward(self, features: Tensor) -> Tensor:
        """Project image features."""
        context = self.layers(features)
        latents = repeat(self.latents, "m d -> i m d", i=len(context))
        for block in self.blocks:
            latents = block(latents, context)
        resampled: Tensor = self.dropout(self.norm(latents))
        return resampled

    def matrices(self) -> list[tuple[nn.Module, int]]:
        """Return the layers with their numbers of tokens, without attention scores (about 1 % of the operations)."""
        counted: list[tuple[nn.Module, int]] = [(layer, self.num_features) for layer in self.layers]
        for block in self.blocks:
            both = self.num_features + self.output.tokens
            counted += [(block.queries, self.output.tokens), (block.keys, both), (block.values, both)]
            counted += [(block.attended, self.output.tokens), (block.mlp, self.output.tokens)]
        return counted


class Block(nn.Module):
    """Latents `float[I, M, D]` attend to the context `float[I, N, D]` and to each other, then pass a gated MLP."""

    def __init__(self, width: int, heads: int, key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads
        self.latents_norm, self.context_norm, self.mlp_norm = (nn.RMSNorm(width, EPS) for _ in range(3))
        self.queries = nn.Linear(width, heads * head_dim, bias=False)
        self.keys = nn.Linear(width, key_value_heads * head_dim, bias=False)
        self.values = nn.Linear(width, key_value_heads * head_dim, bias=False)
        self.attended = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp = GatedMLP(width, 4 * width)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Return the new latents."""
        normed = self.latents_norm(latents)
        both = torch.cat([self.context_norm(context), normed], dim=1)
        query = rearrange(self.queries(normed), "i m (h d) -> i h m d", h=self.heads)
        key, value = (
            repeat(
                layer(both), "i n (h d) -> i (h g) n d", h=self.key_value_heads, g=self.heads // self.key_value_heads
            )
            for layer in (self.keys, self.values)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        latents = latents + self.attended(rearrange(attended, "i h m d -> i m (h d)"))
        result: Tensor = latents + self.mlp(self.mlp_norm(latents))
        return result


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Transform each latent."""
        result: Tensor = self.down(F.silu(self.gate(latents)) * self.up(latents))
        return result
