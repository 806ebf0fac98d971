"""Compare the vision encoder with timm's and the language model with transformers', on the same weights.

Each half is loaded twice, once by the library and once for `VLM`, one after the other, so that one is in memory at a
time. The encoder reads random pixels, the language model random words, causally.

Legend: I images, H image height and width, N image tokens, Dv vision width, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import timm
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from vlmvqa.config.schema import AnyModelSettings, RunSettings
from vlmvqa.errors import InputError
from vlmvqa.hub import SAFE_WEIGHTS, loading_bar, reading
from vlmvqa.models.build import build_language_model, build_vision_encoder, timm_arguments
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.paths import replace_file
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import NONE

IMAGES, ROWS, TOKENS = 2, 2, 64
CLOSE = 1e-3  # largest allowed difference, as a share of the largest value


@dataclass(frozen=True)
class VerifyConfig:
    """Config of launch/verify.py; conf/verify.yaml documents its keys."""

    run: RunSettings
    model: AnyModelSettings
    seed: int = 0
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """The largest difference between our output and the library's, and the largest value of the library's."""

    name: str
    difference: float
    largest: float

    @property
    def equal(self) -> bool:
        """Whether the difference is explained by rounding."""
        return self.difference <= CLOSE * self.largest


def verify(config: VerifyConfig) -> None:
    """Print both comparisons, and write them to `verify.json` in the run's folder.

    Raises:
        InputError: an output differs, or the model has no weights to compare.
    """
    model = config.model
    if not isinstance(model, ModelSettings):
        raise InputError(
            "launch/verify.py compares models of vision encoder, projector and language model; a pretrained "
            "model is the library's own class, so there is nothing to compare"
        )
    for name, weights in (("vision", model.vision.weights), ("language", model.language.weights)):
        if weights == "random":
            raise InputError(f"model.{name}.weights=random: there are no weights to compare; choose another model=...")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(config.seed)
    found = [
        compare_vision(model.vision, device, generator),
        compare_language(replace(model.language, attention="dense"), device, generator),
    ]
    replace_file(config.run.folder / "verify.json", json.dumps([asdict(one) for one in found], indent=2) + "\n")
    for one in found:
        verdict = "equal up to rounding" if one.equal else "DIFFERENT"
        print(f"{one.name:<52} {verdict}: largest difference {one.difference:.2g} of {one.largest:.3g}")
    if not all(one.equal for one in found):
        raise InputError("an output differs from the library's; please report it with the command and the versions")


def compare_vision(settings: VisionSettings, device: torch.device, generator: torch.Generator) -> Comparison:
    """Compare the features of random pixels `float[I, 3, H, H]`: class token and patches, without registers."""
    if settings.fused or settings.layers != -1 or not (settings.norm and settings.class_token):
        raise InputError(
            "launch/verify.py compares the last layer of one encoder, with class token and norm; leave "
            "model.vision.fused, layers, class_token and norm out"
        )
    size = settings.image_size
    pixels = torch.randn(IMAGES, 3, size, size, generator=generator).to(device)

    def theirs() -> Tensor:
        encoder = timm.create_model(settings.name.removeprefix("timm/"), **timm_arguments(settings)).eval().to(device)
        features: Tensor = encoder.forward_features(pixels)
        first = int(encoder.cls_token is not None)
        return torch.cat([features[:, :first], features[:, encoder.num_prefix_tokens :]], dim=1)

    def ours() -> Tensor:
        features: Tensor = build_vision_encoder(settings).eval().to(device)(pixels)
        return features

    return _compare(f"vision encoder, timm's {settings.name}", theirs, ours)


def compare_language(settings: LanguageSettings, device: torch.device, generator: torch.Generator) -> Comparison:
    """Compare the logits `float[B, T, V]` of random words, with transformers' eager attention."""
    words = torch.rand(ROWS, TOKENS, generator=generator)

    def ids(vocabulary: int) -> Tensor:
        return (words * vocabulary).long().clamp(max=vocabulary - 1).to(device)

    def theirs() -> Tensor:
        with reading(f"model.language.name={settings.name}", settings.name), loading_bar():
            model = AutoModelForCausalLM.from_pretrained(
                settings.name, attn_implementation="eager", dtype=torch.float32, **SAFE_WEIGHTS
            )
        model = model.eval().to(device)
        logits: Tensor = model(input_ids=ids(model.config.vocab_size), use_cache=False).logits
        return logits

    def ours() -> Tensor:
        language = build_language_model(settings).eval().to(device)
        tokens = ids(language.config.vocab_size)
        zeros, position = torch.zeros_like(tokens), torch.arange(TOKENS, device=device).expand_as(tokens)
        causal = Tokens(zeros, zeros, torch.full_like(zeros, NONE), position)
        return language.logits(language(language.embed(tokens), causal))

    return _compare(f"language model, transformers' {settings.name}", theirs, ours)


@torch.no_grad()
def _compare(name: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> Comparison:
    outputs = []
    for output in (ours, theirs):  # ours first: its errors name the setting
        outputs.append(output().float().cpu())
        gc.collect()
    found, expected = outputs
    return Comparison(name, float((found - expected).abs().max()), float(expected.abs().max()))
