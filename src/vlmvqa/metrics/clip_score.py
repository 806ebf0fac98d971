"""CLIP similarity of captions and images, without references: CLIPScore with transformers' CLIP.

Source: Hessel et al., "CLIPScore", EMNLP 2021: 2.5 * max(cosine, 0), captions prefixed with "A photo depicts ". The
paper's model is ViT-B/32; numbers of different models are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, when_offline
from vlmvqa.metrics.registry import Answers, AnyId, MeanScore, Metric, Score, check_ids, check_text, percent

if TYPE_CHECKING:  # torch and transformers take seconds to import, so they are imported when an image is scored
    import torch

    from vlmvqa.data.example import Example, ImageSource, Question

MODEL = "openai/clip-vit-base-patch32"
SCALE = 2.5


def clip_similarity(
    predictions: Mapping[AnyId, str],
    images: Mapping[AnyId, ImageSource | str],
    *,
    model: str | Path = MODEL,
    prefix: str = "A photo depicts ",
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> MeanScore:
    """Compute CLIPScore of each caption and its image, in 0..2.5 and usually below 1.

    Args:
        predictions: caption by id; text over CLIP's limit of 77 tokens is truncated.
        images: image by id: a path, the bytes of a file, or a PIL image.
        model: hub id of a CLIP model, or a local folder with its weights, tokenizer and image processor.
        prefix: text prepended to each caption.
        batch_size: captions and images per forward pass.
        device: device of the model (None: a GPU if available).

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
    keys = list(predictions)
    for ids in (keys[start : start + batch_size] for start in range(0, len(keys), batch_size)):
        texts = clip.texts([prefix + predictions[key] for key in ids])
        features = clip.images([images[key] for key in ids], [f"the image of {key!r}" for key in ids])
        cosines = (texts * features).sum(-1)
        scores |= zip(ids, (SCALE * cosines.clamp(min=0)).tolist(), strict=True)
    return MeanScore(fmean(scores.values()), scores)


class _Clip:
    """CLIP model that returns unit vectors `float32[B, D]` of texts and images."""

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        from vlmvqa.hub import loading_bar

        try:
            with hub_or_cache(name), loading_bar():
                model: Any = CLIPModel.from_pretrained(name, **SAFE_WEIGHTS)
                self.processor: Any = CLIPProcessor.from_pretrained(name, **OWN_CODE)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"model={name!r} cannot be loaded{when_offline()} ({reason}); give the local folder or the hub id of a "
                "CLIP model."
            ) from error
        self.model, self.device = model.to(device).eval(), device

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return self._unit(self.model.get_text_features, tokens)

    def images(self, sources: Sequence[ImageSource | str], names: Sequence[str]) -> torch.Tensor:
        from vlmvqa.data.images import decode

        paths = [Path(source) if isinstance(source, str) else source for source in sources]
        decoded = [
            decode(source, str(source) if isinstance(source, Path) else name)
            for source, name in zip(paths, names, strict=True)
        ]
        return self._unit(self.model.get_image_features, self.processor.image_processor(decoded, return_tensors="pt"))

    def _unit(self, embed: Any, inputs: Any) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            # transformers 5 returns the projected embedding as the pooled output.
            projected = embed(**inputs.to(self.device)).pooler_output
            return torch.nn.functional.normalize(projected.float(), dim=-1)


def _score(questions: Sequence[Question], answers: Answers, images: Mapping[Any, ImageSource], **options: Any) -> Score:
    result = clip_similarity(answers, images, **options)
    return Score({"clip_similarity": 100 * result.score}, percent(result.per_question))


def _check_examples(examples: Iterable[Example], **options: Any) -> None:
    """Check that the model can be loaded, by scoring a small image."""
    from PIL import Image

    clip_similarity({0: "a"}, {0: Image.new("RGB", (8, 8))}, **options)


CLIP_SIMILARITY = Metric(
    title="CLIP similarity (x 100)",
    version="clip_similarity: CLIPScore, of ViT-B/32 where no model is named",
    score=_score,
    check_options=lambda model="", prefix="": None,
    check_examples=_check_examples,
    options=("model", "prefix"),
    correct_from=None,
    needs_images=True,
)
