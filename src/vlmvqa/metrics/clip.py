"""CLIP similarity of captions and images, without references: CLIPScore with the CLIP of transformers.

Source: Hessel et al., "CLIPScore", EMNLP 2021: 2.5 * max(cosine, 0), captions after "A photo depicts ". The paper's
model is ViT-B/32; another model gives other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, when_offline
from vlmvqa.metrics.checks import Id, check_ids, check_text

if TYPE_CHECKING:  # torch and transformers take seconds to import: only when a picture is scored
    import torch

    from vlmvqa.data.example import ImageSource

MODEL = "openai/clip-vit-base-patch32"
SCALE = 2.5


@dataclass(frozen=True, slots=True)
class ClipSimilarity:
    """CLIPScore in 0..2.5, most often below 1: the mean, and each caption's."""

    score: float
    per_question: dict[int | str, float]


def clip_similarity(
    predictions: Mapping[Id, str],
    images: Mapping[Id, ImageSource | str],
    *,
    model: str | Path = MODEL,
    prefix: str = "A photo depicts ",
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> ClipSimilarity:
    """How near each caption is to its image in CLIP's space.

    Args:
        predictions: caption or answer by id; what is longer than CLIP's text (77 tokens) is cut.
        images: a path, an encoded file's bytes or a PIL image by id.
        model: a CLIP's id on the hub, or a local folder with its weights, tokenizer and image processor.
        prefix: what stands before each caption.
        batch_size: captions and images at a time.
        device: where the model runs (None: a GPU if there is one).

    Raises:
        InputError: ids differ between the mappings, an image cannot be read, or the model cannot be loaded.
    """
    import torch

    if not predictions:
        raise InputError("There are no captions to score.")
    check_ids("image", images, predictions)
    check_ids("caption", predictions, images)
    check_text(predictions)
    clip = _Clip(str(model), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    scores: dict[int | str, float] = {}
    for ids in _batches(list(predictions), batch_size):
        texts = clip.texts([prefix + predictions[key] for key in ids])
        pictures = clip.images([images[key] for key in ids], [f"the image of {key!r}" for key in ids])
        cosines = (texts * pictures).sum(-1)
        scores |= zip(ids, (SCALE * cosines.clamp(min=0)).tolist(), strict=True)
    return ClipSimilarity(fmean(scores.values()), scores)


class _Clip:
    """Unit vectors `float32[B, D]` of texts and of pictures."""

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        from vlmvqa.progress import loading_bar

        try:
            with hub_or_cache(name), loading_bar():
                model: Any = CLIPModel.from_pretrained(name, **SAFE_WEIGHTS)
                self.processor: Any = CLIPProcessor.from_pretrained(name, **OWN_CODE)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"model={name!r} cannot be loaded{when_offline()} ({reason}); give a CLIP's local folder, or "
                "its id on the hub."
            ) from error
        self.model = model.to(device).eval()
        self.device = device

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return self._unit(self.model.get_text_features, tokens)

    def images(self, sources: Sequence[ImageSource | str], names: Sequence[str]) -> torch.Tensor:
        from vlmvqa.data.images import decode

        pictures = [
            decode(Path(source) if isinstance(source, str) else source, _name(source, name))
            for source, name in zip(sources, names, strict=True)
        ]
        return self._unit(self.model.get_image_features, self.processor.image_processor(pictures, return_tensors="pt"))

    def _unit(self, embed: Any, inputs: Any) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            # transformers 5 gives the projected embedding as the pooled output.
            projected = embed(**inputs.to(self.device)).pooler_output
            return torch.nn.functional.normalize(projected.float(), dim=-1)


def _name(source: object, name: str) -> str:
    """How an error names a picture: by its file, where it has one."""
    return str(source) if isinstance(source, str | Path) else name


def _batches(ids: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
