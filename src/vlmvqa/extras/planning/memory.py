"""What one forward and backward pass holds in memory and computes: counted, not guessed, without a GPU or weights.

The real model runs at its real size under PyTorch's FakeTensorMode: every operation is made, no number is computed.
Each storage is counted from birth to death (`ledger.py`), so the count holds what autograd keeps, the logits, and what
lives for a moment only.

One pass is enough for all batch sizes. It has a prime number of rows and another prime number of supervised tokens,
and neither divides any size of the model: bytes that are a multiple of the first grow with the rows, of the second with
the supervised tokens, and all others do not grow.

Legend: B rows, T tokens a row, S supervised tokens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning import published_sizes, quantized_memory
from vlmvqa.extras.planning.memory_tracker import Ledger
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM, build_pretrained
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.vlm import VLM, Batch, ModelSettings, build
from vlmvqa.sequence.loss import CHUNK
from vlmvqa.sequence.rows import FILL, IGNORE, Document, TokenizedQuestion, build_row, pad_rows

ROW_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039)
TOKEN_PRIMES = (983, 977, 971, 967, 953, 947, 941)  # below CHUNK: the loss in one piece
assert max(TOKEN_PRIMES) < CHUNK
Settings = ModelSettings | PretrainedSettings


@dataclass(frozen=True)
class RowShape:
    """What a row of the batch is: `T` tokens, its images, and how many of its tokens are supervised."""

    tokens: int
    images: int
    supervised: int


@dataclass(frozen=True)
class Arithmetic:
    """The dtype in which the weights meet the computation, and whether autocast is on around it.

    A mixed-precision run is `(float32, True)` under DDP, `(bfloat16, True)` under FSDP, which gathers weights in
    bfloat16, and `(bfloat16, False)` under DeepSpeed, which converts the model. `weights` None: each in its own, as
    under DDP, where adapters may be float32 and what they stand beside bfloat16. `half` is autocast's dtype.
    """

    weights: torch.dtype | None
    autocast: bool
    half: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Held:
    """Bytes that one micro-batch holds beside weights, gradients and optimizer states.

    Attributes:
        activations: alive when the decoder has returned and the loss is not yet begun.
        logits: what the loss, forward and backward, needs at most beside them.
        kept: alive when the forward pass has returned.
        decoder_peak, encoder_peak: the most until the decoder's backward pass is done, and after it.
        peak_and_gradients: the most at any moment together with the gradients that have been made by then.
    """

    activations: int
    logits: int
    kept: int
    decoder_peak: int
    encoder_peak: int
    peak_and_gradients: int


@dataclass(frozen=True)
class Footprint:
    """The memory of every moment of a pass, and its operations, for any number of rows.

    Attributes:
        constant, per_row, per_token, gradients: bytes alive after each operation, `int64[moments]`.
        decoded, returned: the moments when the decoder has returned, and the forward pass has.
        scored, embedded: the moments when the backward pass is through the loss, and through the decoder.
        row_flops, token_flops: multiplications and additions for a row, and for a supervised token.
    """

    shape: RowShape
    constant: np.ndarray
    per_row: np.ndarray
    per_token: np.ndarray
    gradients: np.ndarray
    decoded: int
    returned: int
    scored: int
    embedded: int
    row_flops: int
    token_flops: int

    def at(self, rows: int) -> Held:
        # More supervised tokens than a chunk holds are scored a chunk at a time (`sequence/loss.py`).
        tokens = min(rows * self.shape.supervised, CHUNK)
        alive = self.constant + rows * self.per_row + tokens * self.per_token
        activations = int(alive[self.decoded])
        return Held(
            activations=activations,
            logits=int(alive[self.decoded : self.scored + 1].max()) - activations,
            kept=int(alive[self.returned]),
            decoder_peak=int(alive[: self.embedded + 1].max()),
            encoder_peak=int(alive[self.embedded :].max()),
            peak_and_gradients=int((alive + self.gradients).max()),
        )

    def flops(self, rows: int) -> int:
        """Of a forward and backward pass, recomputation included."""
        return rows * (self.row_flops + self.shape.supervised * self.token_flops)


def without_weights(settings: ModelSettings) -> ModelSettings:
    """The same model, with weights that need not be read."""
    vision, language = replace(settings.vision, weights="random"), replace(settings.language, weights="random")
    return replace(settings, vision=vision, language=language)


def built(settings: Settings) -> Model:
    """The model with random weights."""
    if isinstance(settings, ModelSettings):
        return build(without_weights(settings))
    return build_pretrained(replace(settings, weights="random"), published_sizes.known_config(settings))


def skeleton(settings: Settings, trainable: Mapping[str, str | int], adapt: AdapterSettings | None = None) -> Any:
    """The model on the meta device, with adapters if it is to have any: every name and shape, no weights."""
    with torch.device("meta"):
        model = built(settings)
        if adapt is not None and adapt.bits:
            quantized_memory.pack(model, adapt)
            adapt = replace(adapt, bits=None)
        peft_adapters.prepare(model, trainable, adapt)
        return model


def _allocated(model: Model) -> Model:
    # CPU tensors: a CUDA one needs a driver for its backward pass.
    model = model.to_empty(device="cpu")
    if isinstance(model, PretrainedVLM):
        model.net.tie_weights()
    return model


def row_shape(model: VLM, images: int, questions: int, text_tokens: int, answer_tokens: int) -> RowShape:
    """The shape of a row of `images` images with so many questions each, laid out and padded as the data would be.

    Args:
        text_tokens: prompt, answer and EOS of a question.
        answer_tokens: those of the answer and EOS.
    """
    if not 0 < answer_tokens < text_tokens:
        raise InputError(f"plan.answer_tokens={answer_tokens} must be fewer than the question's {text_tokens} tokens")
    question = TokenizedQuestion([0] * (text_tokens - answer_tokens), [0] * answer_tokens)
    documents = [Document(image, [question] * questions) for image in range(images)]
    columns = pad_rows([build_row(documents, model.vision.tokens, model.mode)], multiple=8)
    return RowShape(columns["labels"].shape[1], images, int((columns["labels"] != IGNORE).sum()))


def measure(
    model: Model,
    shape: RowShape,
    arithmetic: Arithmetic,
    checkpointing: bool,
    settings: Settings | None = None,
) -> Footprint:
    """Run a model of `skeleton` (it is used up) forward and backward without data, and count.

    Args:
        checkpointing: recompute the activations of encoder blocks and decoder layers in the backward pass.
        settings: those of a pretrained model, whose rows go by them.
    """
    rows, tokens = _primes(model, shape)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    if arithmetic.weights is not None:
        model = model.to(arithmetic.weights)
    model = model.train()
    with fake:
        model = _allocated(model)
        batch = empty_batch(model, shape, rows, settings)
    if checkpointing:
        model.checkpoint_activations()
    if arithmetic.autocast:
        _norms_as_on_cuda(model)
    unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")  # they look into the data
    with unchecked, fake, _flex_without_kernel(model):
        return count(model, batch, shape, arithmetic.autocast, rows, tokens, arithmetic.half)


def empty_batch(model: Model, shape: RowShape, rows: int, settings: Settings | None) -> dict[str, Tensor]:
    """So many rows that say nothing."""
    if isinstance(model, PretrainedVLM):
        assert isinstance(settings, PretrainedSettings)
        return published_sizes.batch(model, settings, rows, shape.tokens, shape.supervised)
    kinds = {name: torch.float32 if isinstance(fill, float) else torch.int64 for name, fill in FILL.items()}
    batch = {name: torch.zeros(rows, shape.tokens, dtype=kind) for name, kind in kinds.items()}
    size = model.vision.image_size
    return {**batch, "pixel_values": torch.zeros(rows * shape.images, 3, size, size)}


def count(
    model: Model,
    batch: Batch,
    shape: RowShape,
    autocast: bool,
    rows: int = 0,
    tokens: int = 0,
    half: torch.dtype = torch.bfloat16,
) -> Footprint:
    """Count one forward and backward pass of a model on a batch, with data or without.

    A pretrained model's batch is counted too: its pictures may be many times a row's activations.

    Args:
        rows, tokens: the primes that tell what grows with the batch (0: a batch with data; then nothing is told
            apart, all bytes are the `constant` ones).
    """
    ledger = Ledger(rows, tokens, published_sizes.pictures(batch))
    ledger.ignore([*model.parameters(), *model.buffers()])
    (ledger.hold if isinstance(model, PretrainedVLM) else ledger.ignore)(batch.values())

    def begins(_: Any, inputs: Any, named: Any) -> None:
        ledger.mark_gradient("embedded", inputs[0] if inputs else named["inputs_embeds"])

    def ends(_: Any, __: Any, found: Any) -> None:
        ledger.mark("decoded")
        ledger.mark_gradient("scored", found if isinstance(found, Tensor) else found.last_hidden_state)

    hooks: list[Any] = [
        model.language.register_forward_pre_hook(begins, with_kwargs=True),
        model.language.register_forward_hook(ends),
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        hooks.append(parameter.register_post_accumulate_grad_hook(ledger.set_gradient_aside))
    divisor = torch.tensor(1)
    with ledger:
        with torch.autocast("cpu", half, enabled=autocast):
            loss = model(num_items_in_batch=divisor, **batch)["loss"]
        ledger.mark("returned")
        loss.backward()
        for name in ("scored", "embedded"):  # what needs no gradient has none
            if name not in ledger.marks:
                ledger.mark(name)
    for hook in hooks:
        hook.remove()
    constant, per_row, per_token, gradients = np.array(ledger.timeline, dtype=np.int64).T
    return Footprint(shape, constant, per_row, per_token, gradients, **ledger.marks, **ledger.flops())


def _norms_as_on_cuda(model: Model) -> None:
    """Autocast's one difference here between CPU and CUDA: there, layer norms compute and answer in float32."""

    def in_float32(norm: nn.LayerNorm, values: Tensor) -> Tensor:
        weight, bias = norm.weight.float(), norm.bias.float()
        return torch.nn.functional.layer_norm(values.float(), norm.normalized_shape, weight, bias, norm.eps)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(in_float32, module)  # type: ignore[method-assign]


class _Flash(torch.autograd.Function):
    """An attention kernel that keeps queries, keys, values, output and one number a query, as FlexAttention's does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values)
        ctx.save_for_backward(query, key, value, out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, norm = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_keys, to_values = backward(gradients[0], query, keys, values, out, norm, 0.0, False)
        shape = (key.shape[0], key.shape[1], groups, *key.shape[2:])
        return to_query, to_keys.reshape(shape).sum(2), to_values.reshape(shape).sum(2)


@contextlib.contextmanager
def _flex_without_kernel(model: Model) -> Iterator[None]:
    """FlexAttention is compiled for CUDA; a kernel that keeps the same tensors stands in for it."""
    if isinstance(model, PretrainedVLM) or model.language.attention != "flex":
        yield
        return

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Flash.apply(query, key, value).transpose(1, 2).contiguous(), None

    name = "planned_flex"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    model.language.decoder.config._attn_implementation = name
    masks: Callable[..., Any] = lambda *_: dict.fromkeys(("full_attention", "sliding_attention"))  # noqa: E731
    model.language._masks = masks  # type: ignore[method-assign]
    yield


def _primes(model: Model, shape: RowShape) -> tuple[int, int]:
    """A number of rows and one of supervised tokens that divide no size of the model."""
    if isinstance(model, PretrainedVLM):
        vision: Any = model.net.config.vision_config
        sizes = {shape.tokens, vision.image_size, vision.image_size // vision.patch_size}
    else:
        sizes = {shape.tokens, model.vision.tokens, model.vision.image_size}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes.update(tensor.shape)

    def free(primes: Iterable[int]) -> int:
        return next(prime for prime in primes if all(size % prime for size in sizes))

    return free(ROW_PRIMES), free(TOKEN_PRIMES)
