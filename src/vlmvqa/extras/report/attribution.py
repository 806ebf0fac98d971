"""Where in a picture a model looked for an answer, as heat over the patches of its vision encoder.

attention   how much the positions that predict the answer attend to each patch, the mean over layers and heads. What it
            reads, not why: a patch may be read and change nothing (Jain & Wallace 2019).
gradient    how much each patch's features speak for the answer: gradient x features, its positive part (HiResCAM,
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
from vlmvqa.extras.pretrained.model import PretrainedVLM
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import IGNORE, IMAGE, PADDING, PROMPT

METHODS = ("attention", "gradient")
OPAQUE = 0.75  # of the hottest place, over the picture


@dataclass(frozen=True)
class Look:
    """Where a model looked.

    Attributes:
        heat: float32[rows, columns], of the patches; adds up to 1.
        box: left, top, right, bottom of the upright picture's pixels that the patches cover.
    """

    heat: np.ndarray
    box: tuple[int, int, int, int]


def look(predictor: Predictor, image: ImageSource | str, question: str, answer: str, method: str = "attention") -> Look:
    """Where the model looks when it gives this answer.

    Args:
        answer: one that it gave, or any other; empty: where it looked before it ended without a word.
        method: "attention" or "gradient".

    Raises:
        InputError: the image cannot be read, the question is empty, or the model does not keep its patches apart.
    """
    if method not in METHODS:
        raise InputError(f"method={method} is unknown; use {' or '.join(METHODS)}")
    picture = decode(Path(image) if isinstance(image, str) else image, "the image")
    batch = _answered(predictor, predictor.asked(picture, question), answer)
    model, training = predictor.model, predictor.model.training
    model.eval()
    try:
        found = _attention(model, batch) if method == "attention" else _gradient(model, batch)
    finally:
        model.train(training)
    heat = found.float().clamp(min=0).cpu().numpy()
    total = heat.sum()
    heat = heat / total if total > 0 else np.full_like(heat, 1 / heat.size)
    return Look(heat, _box(picture, predictor.processor.images.resize))


def draw(picture: Image.Image, seen: Look) -> Image.Image:
    """The heat over the picture (RGB, upright): the hottest place in full colour, the coldest as it is."""
    from matplotlib import colormaps

    left, top, right, bottom = seen.box
    levels = Image.fromarray((255 * seen.heat / seen.heat.max()).astype(np.uint8))
    smooth = np.asarray(levels.resize((right - left, bottom - top), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    colours = Image.fromarray((colormaps["inferno"](smooth)[..., :3] * 255).astype(np.uint8))
    drawn = picture.convert("RGB")
    drawn.paste(colours, (left, top), Image.fromarray((smooth * OPAQUE * 255).astype(np.uint8)))
    return drawn


def _answered(predictor: Predictor, example: Example, answer: str) -> dict[str, Tensor]:
    """The row of a question with its answer supervised, or with the end of a row that has none."""
    if answer.strip():
        return predictor.batch([predictor.processor.encode(example, [answer])])
    batch = predictor.batch([predictor.processor.encode(example, [None])])
    prompt = (batch["role"] == PROMPT) & (batch["document"] != PADDING)
    last = (prompt * batch["position"]).argmax(-1, keepdim=True)
    ends = torch.full_like(last, min(predictor.processor.ends))
    return {**batch, "labels": batch["labels"].scatter(1, last, ends)}


@torch.no_grad()
def _attention(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """`float[rows, columns]`, over patches that the decoder reads one by one."""
    places = ((batch["role"] == IMAGE) & (batch["document"] != PADDING))[0].nonzero()[:, 0]
    rows, columns = _grid(model, batch)
    mixed = any("resampler" in name for name, _ in model.projector.named_modules())  # Idefics2's latents
    if mixed or len(places) - rows * columns not in (0, 1):  # 1: the class token, which comes first
        raise InputError(
            f"the model reads {len(places)} image tokens that do not stand for {rows} x {columns} patches one by one, "
            "so its attention to a place is not known; use method=gradient"
        )
    reads = (batch["labels"][0] != IGNORE).nonzero()[:, 0]
    reads = reads[: max(len(reads) - 1, 1)]  # what predicts the answer's words, not their end
    means = _weights(model, batch, reads, places)
    return torch.stack(means).mean(0)[-rows * columns :].view(rows, columns)


def _weights(model: Model, batch: dict[str, Tensor], reads: Tensor, places: Tensor) -> list[Tensor]:
    """How much these tokens attend to those places, `float32[places]` of each layer, the mean over heads and tokens.

    By transformers' eager attention, which tells its weights and keeps the softcap; a layer's are gone before the next
    makes its own.
    """
    decoder = model.language if isinstance(model, PretrainedVLM) else model.language.decoder
    means: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        means.append(output[1][0][:, reads][..., places].float().mean((0, 1)))  # of float[1, heads, T, T]

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in decoder.layers]
    before = model.attention
    if isinstance(model, VLM):
        model.language.set_attention("dense")  # its masks are what eager attention takes
    decoder.set_attn_implementation("eager")
    try:
        model.decode(batch)
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(model, VLM):
            model.language.set_attention(before)
        else:
            decoder.set_attn_implementation(before)
    return means


def _gradient(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """`float[rows, columns]`; of the whole picture, which comes last, where a model reads it in pieces too."""
    kept: list[Tensor] = []

    def begin_here(_: nn.Module, __: Any, output: Any) -> Any:
        """What the encoder has made is where gradients end: they need not go through it."""
        whole = isinstance(output, Tensor)
        kept.append((output if whole else output.last_hidden_state).detach().requires_grad_())
        if whole:
            return kept[0]
        output.last_hidden_state = kept[0]
        return output

    hook = model.vision.register_forward_hook(begin_here)
    try:
        with torch.enable_grad():
            loss = model(**batch)["loss"]
            (gradient,) = torch.autograd.grad(loss, kept, allow_unused=True)
    finally:
        hook.remove()
    if gradient is None:
        raise InputError(
            f"the language model does not read the last features of {type(model.vision).__name__}, so their gradient "
            "is not known; use method=attention"
        )
    rows, columns = _grid(model, batch)
    speaks_for = -(gradient * kept[0].detach()).sum(-1)[-1, -rows * columns :].view(rows, columns)
    if "pixel_attention_mask" not in batch:
        return speaks_for
    real = batch["pixel_attention_mask"][0, -1]  # [H, W]: pieces are padded to the largest
    across, down = real.any(0).sum() * columns // real.shape[1], real.any(1).sum() * rows // real.shape[0]
    return speaks_for[:down, :across]


def _grid(model: Model, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of patches in a picture, or in a piece of it."""
    if isinstance(model, VLM):
        rows, columns = model.vision.encoder.patch_embed.grid_size
        return rows, columns
    height, width = batch["pixel_values"].shape[-2:]
    side = model.net.config.vision_config.patch_size
    return height // side, width // side


def _box(picture: Image.Image, resize: str) -> tuple[int, int, int, int]:
    """What of a picture the model saw (`images.to_tensor`)."""
    width, height = picture.size
    if resize != "center_crop":
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
