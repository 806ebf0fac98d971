"""Attribution of an answer to image patches, as a heat map over the patches of the vision encoder.

attention   attention from the positions that predict the answer to each patch, averaged over layers and heads. It shows
            which patches are read, not which ones decide: a patch may be read without effect (Jain & Wallace 2019).
gradient    contribution of each patch's features to the answer: the positive part of gradient x features (HiResCAM,
            Draelos & Carin 2020). Costs a backward pass.

Legend: B rows, T tokens, N patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmvqa.data.example import Example, ImageSource
from vlmvqa.data.images import decode
from vlmvqa.errors import InputError
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.interface import Model
from vlmvqa.sequence.rows import IGNORE, IMAGE, PADDING, PROMPT

METHODS = ("attention", "gradient")
MAX_OPACITY = 0.75  # of the hottest patch, over the image


@dataclass(frozen=True)
class Attribution:
    """Heat map of an answer.

    Attributes:
        heat: float32[rows, columns], one value per patch; sums to 1.
        box: left, top, right, bottom of the region that the patches cover, in pixels of the upright image.
    """

    heat: np.ndarray
    box: tuple[int, int, int, int]


def attribute(
    predictor: Predictor, image: ImageSource | str, question: str, answer: str, method: str = "attention"
) -> Attribution:
    """Attribute an answer to the patches of an image.

    Args:
        predictor: the model.
        image: a path, the bytes of a file, or a PIL image.
        question: question about the image.
        answer: the model's answer or any other; empty: the end of the answer is attributed.
        method: "attention" or "gradient".

    Raises:
        InputError: the image cannot be read, the question is empty, or the model does not keep its patches separate.
    """
    if method not in METHODS:
        raise InputError(f"method={method} is unknown; use {' or '.join(METHODS)}")
    decoded = decode(Path(image) if isinstance(image, str) else image, "the image")
    batch = _answered_row(predictor, predictor.asked(decoded, question), answer)
    model, training = predictor.model, predictor.model.training
    model.eval()
    try:
        result = _attention(model, batch) if method == "attention" else _gradient(model, batch)
    finally:
        model.train(training)
    heat = result.float().clamp(min=0).cpu().numpy()
    total = heat.sum()
    heat = heat / total if total > 0 else np.full_like(heat, 1 / heat.size)
    return Attribution(heat, _visible_box(decoded, predictor.processor.images.resize))


def draw(image: Image.Image, attribution: Attribution) -> Image.Image:
    """Draw a heat map over an image (RGB, upright): the hottest patch in full colour, the coldest transparent."""
    from matplotlib import colormaps

    left, top, right, bottom = attribution.box
    levels = Image.fromarray((255 * attribution.heat / attribution.heat.max()).astype(np.uint8))
    smooth = np.asarray(levels.resize((right - left, bottom - top), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    colours = Image.fromarray((colormaps["inferno"](smooth)[..., :3] * 255).astype(np.uint8))
    overlay = image.convert("RGB")
    overlay.paste(colours, (left, top), Image.fromarray((smooth * MAX_OPACITY * 255).astype(np.uint8)))
    return overlay


def _answered_row(predictor: Predictor, example: Example, answer: str) -> dict[str, Tensor]:
    """Return the row of a question with its answer supervised, or only its end token if the answer is empty."""
    if answer.strip():
        return predictor.batch([predictor.processor.encode(example, [answer])])
    batch = predictor.batch([predictor.processor.encode(example, [None])])
    prompt = (batch["role"] == PROMPT) & (batch["document"] != PADDING)
    last = (prompt * batch["position"]).argmax(-1, keepdim=True)
    ends = torch.full_like(last, min(predictor.processor.end_token_ids))
    return {**batch, "labels": batch["labels"].scatter(1, last, ends)}


@torch.no_grad()
def _attention(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Return `float[rows, columns]`; the decoder must read each patch as one token."""
    image_tokens = ((batch["role"] == IMAGE) & (batch["document"] != PADDING))[0].nonzero()[:, 0]
    grid = model.token_grid(batch)
    if grid is None or len(image_tokens) - grid[0] * grid[1] not in (0, 1):  # 1: the class token, which comes first
        rows, columns = model.patch_grid(batch)
        raise InputError(
            f"the model reads {len(image_tokens)} image tokens that do not correspond one to one to {rows} x {columns} "
            "patches, so attention to a patch is undefined; use method=gradient"
        )
    rows, columns = grid
    queries = (batch["labels"][0] != IGNORE).nonzero()[:, 0]
    queries = queries[: max(len(queries) - 1, 1)]  # positions that predict the answer's words, not its end
    means = _attention_weights(model, batch, queries, image_tokens)
    return torch.stack(means).mean(0)[-rows * columns :].view(rows, columns)


def _attention_weights(model: Model, batch: dict[str, Tensor], queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Return each layer's attention to `keys`, averaged over heads and `queries`: `float32[keys]` per layer.

    Uses transformers' eager attention, which returns its weights and applies the softcap. Each layer's weights are
    freed before the next layer runs.
    """
    means: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        means.append(output[1][0][:, queries][..., keys].float().mean((0, 1)))  # weights: float[1, heads, T, T]

    with model.eager_attention() as layers:
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            model.decode(batch)
        finally:
            for hook in hooks:
                hook.remove()
    return means


def _gradient(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Return `float[rows, columns]`, for the full image (the last one) if the model also reads tiles of it."""
    features: list[Tensor] = []

    def detach_features(_: nn.Module, __: Any, output: Any) -> Any:
        """Stop gradients at the encoder's output: they aren't needed inside the encoder."""
        is_tensor = isinstance(output, Tensor)
        features.append((output if is_tensor else output.last_hidden_state).detach().requires_grad_())
        if is_tensor:
            return features[0]
        output.last_hidden_state = features[0]
        return output

    encoder = model.part("vision").module
    hook = encoder.register_forward_hook(detach_features)
    try:
        with torch.enable_grad():
            loss = model(**batch)["loss"]
            (gradient,) = torch.autograd.grad(loss, features, allow_unused=True)
    finally:
        hook.remove()
    if gradient is None:
        raise InputError(
            f"the language model does not read the last features of {type(encoder).__name__}, so their gradient "
            "is undefined; use method=attention"
        )
    rows, columns = model.patch_grid(batch)
    contribution = -(gradient * features[0].detach()).sum(-1)[-1, -rows * columns :].view(rows, columns)
    if "image_mask" in batch:
        real = batch["image_mask"][-1, -rows * columns :].view(rows, columns)
        return contribution[real.any(1)][:, real.any(0)]
    if "pixel_attention_mask" not in batch:
        return contribution
    real = batch["pixel_attention_mask"][0, -1]  # [H, W]: tiles are padded to the largest
    across, down = real.any(0).sum() * columns // real.shape[1], real.any(1).sum() * rows // real.shape[0]
    return contribution[:down, :across]


def _visible_box(image: Image.Image, resize: str) -> tuple[int, int, int, int]:
    """Return the region of an image that the model receives (see `images.to_tensor`)."""
    width, height = image.size
    if resize != "center_crop":
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
