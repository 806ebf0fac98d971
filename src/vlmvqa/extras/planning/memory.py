"""Memory and FLOPs of one forward and backward pass, measured on the real model without a GPU, data or weights.

The model runs at full size under PyTorch's FakeTensorMode: operations are dispatched but not computed. `MemoryTracker`
tracks every storage, so the result covers tensors saved by autograd, logits and temporaries.

One pass is enough for all batch sizes. It has a prime number of rows and another prime number of supervised tokens,
neither of which divides a size of the model: bytes that are a multiple of the first grow with the rows, bytes that are
a multiple of the second with the supervised tokens, all others don't grow.

Legend: B rows, T tokens per row, S supervised tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning import quantized_memory
from vlmvqa.extras.planning.batches import RowShape, crops_per_image, dummy_batch
from vlmvqa.extras.planning.cuda_emulation import replace_flex_attention, use_float32_norms
from vlmvqa.extras.planning.memory_tracker import MemoryTracker
from vlmvqa.extras.planning.published_sizes import Settings, known_config
from vlmvqa.extras.pretrained.build import build_pretrained
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.models.build import build, random_weights
from vlmvqa.models.interface import Model
from vlmvqa.sequence.loss import CHUNK
from vlmvqa.sequence.rows import Batch

ROW_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039)
TOKEN_PRIMES = (983, 977, 971, 967, 953, 947, 941)  # below CHUNK, so that the loss is computed in one chunk
assert max(TOKEN_PRIMES) < CHUNK


@dataclass(frozen=True)
class Precision:
    """Dtypes of a pass: of the weights (None: each keeps its own), and of autocast, if the pass runs under it.

    Mixed precision is `(None, True)` under DDP, `(bfloat16, True)` under FSDP, which gathers weights in bfloat16, and
    `(bfloat16, False)` under DeepSpeed, which converts the model.
    """

    weights: torch.dtype | None
    autocast: bool
    half: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class BatchMemory:
    """Bytes of a micro-batch, in addition to weights, gradients and optimizer states.

    Attributes:
        activations: Alive between the decoder's forward pass and the loss.
        logits: Additional peak of the loss, forward and backward.
        kept: Alive after the forward pass.
        decoder_peak: Peak up to the end of the decoder's backward pass.
        encoder_peak: Peak after it.
        peak_and_gradients: Peak of the sum with the gradients computed so far.
    """

    activations: int
    logits: int
    kept: int
    decoder_peak: int
    encoder_peak: int
    peak_and_gradients: int


@dataclass(frozen=True)
class PassProfile:
    """Memory at each moment of a pass, and its FLOPs, for any number of rows.

    Attributes:
        shape: Shape of a row.
        constant, per_row, per_token, gradients: Bytes alive after each operation, int64[moments].
        decoded, returned: Moments when the decoder and the model's forward pass have returned.
        scored, embedded: Moments when the backward pass has left the loss and the decoder.
        row_flops: FLOPs per row, including recomputation: of "encoder" (with projector), "decoder" (its matrices) and
            "attention" (the decoder's, of all pairs of tokens).
        token_flops: FLOPs per supervised token.
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
    row_flops: dict[str, int]
    token_flops: int

    def at(self, rows: int) -> BatchMemory:
        """Return the memory of a micro-batch of `rows` rows."""
        # The loss is computed in chunks of supervised tokens (`sequence/loss.py`).
        tokens = min(rows * self.shape.supervised, CHUNK)
        alive = self.constant + rows * self.per_row + tokens * self.per_token
        activations = int(alive[self.decoded])
        return BatchMemory(
            activations=activations,
            logits=int(alive[self.decoded : self.scored + 1].max()) - activations,
            kept=int(alive[self.returned]),
            decoder_peak=int(alive[: self.embedded + 1].max()),
            encoder_peak=int(alive[self.embedded :].max()),
            peak_and_gradients=int((alive + self.gradients).max()),
        )


def build_random(settings: Settings) -> Model:
    """Build the model with random weights."""
    if isinstance(settings, PretrainedSettings):
        return build_pretrained(replace(settings, weights="random"), known_config(settings))
    language = replace(settings.language, weights="random")
    return build(replace(settings, vision=random_weights(settings.vision), language=language))


def build_on_meta(
    settings: Settings, trainable: Mapping[str, str | int], adapt: AdapterSettings | None = None
) -> Model:
    """Build the model, with its adapters if any, on the meta device: all names and shapes, no weights."""
    with torch.device("meta"):
        model = build_random(settings)
        if adapt is not None and adapt.bits:
            quantized_memory.quantize(model, adapt)
            adapt = replace(adapt, bits=None)
        peft_adapters.prepare(model, trainable, adapt)
        return model


def measure(
    model: Model, settings: Settings, shape: RowShape, precision: Precision, checkpointing: bool
) -> PassProfile:
    """Measure a forward and backward pass of a model of `build_on_meta`, which cannot be used again."""
    sizes = {size for t in dummy_batch(settings, shape, 1).values() for size in t.shape}
    sizes.update(size for t in (*model.parameters(), *model.buffers()) for size in t.shape)
    rows, tokens = (
        next(prime for prime in primes if all(size % prime for size in sizes)) for primes in (ROW_PRIMES, TOKEN_PRIMES)
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    if precision.weights is not None:
        model = model.to(precision.weights)
    model = model.train()
    with fake:
        model = model.to_empty(device="cpu")  # the backward pass of CUDA tensors needs a driver
        model.tie_weights()
        batch = dummy_batch(settings, shape, rows)
    if checkpointing:
        model.checkpoint_activations()
    if precision.autocast:
        use_float32_norms(model)
    if model.attention == "flex":
        replace_flex_attention(model)
    # transformers' input checks read tensor values.
    with mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"), fake:
        return profile(model, batch, shape, precision, MemoryTracker(rows, tokens, crops_per_image(settings)))


def profile(
    model: Model, batch: Batch, shape: RowShape, precision: Precision, tracker: MemoryTracker | None = None
) -> PassProfile:
    """Profile one forward and backward pass of a real or fake model.

    A pretrained model's batch is included: its images may be many times as large as a row's activations. Of
    `precision`, the dtype of the weights is ignored. Without a `tracker`, for a real batch, all bytes are constant.
    """
    tracker = tracker or MemoryTracker()
    tracker.exclude([*model.parameters(), *model.buffers()])
    (tracker.include if isinstance(model, PretrainedVLM) else tracker.exclude)(batch.values())

    def before_decoder(_: Any, inputs: Any, named: Any) -> None:
        tracker.part = "decoder"
        embeddings = inputs[0] if inputs else named["inputs_embeds"]
        tracker.mark_gradient("embedded", embeddings)
        if embeddings.requires_grad:
            embeddings.register_hook(lambda _: setattr(tracker, "part", "encoder"))

    def after_decoder(_: Any, __: Any, output: Any) -> None:
        tracker.mark("decoded")
        tracker.mark_gradient("scored", output if isinstance(output, Tensor) else output.last_hidden_state)

    decoder = model.part("language").module
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(tracker.release_gradient) for p in trained]
    hooks.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
    hooks.append(decoder.register_forward_hook(after_decoder))
    divisor = torch.tensor(1)
    with tracker:
        with torch.autocast("cpu", precision.half, enabled=precision.autocast):
            loss = model(num_items_in_batch=divisor, **batch)["loss"]
        tracker.mark("returned")
        loss.backward()
        for name in ("scored", "embedded"):  # not marked if the tensor needs no gradient
            if name not in tracker.marks:
                tracker.mark(name)
    for hook in hooks:
        hook.remove()
    constant, per_row, per_token, gradients = np.array(tracker.timeline, dtype=np.int64).T
    row_flops, token_flops = tracker.flops()
    marks = tracker.marks
    return PassProfile(
        shape, constant, per_row, per_token, gradients, row_flops=row_flops, token_flops=token_flops, **marks
    )
