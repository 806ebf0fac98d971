"""A plan against the truth: a few real steps of one process on the GPU that is here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmvqa.errors import InputError, counted
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.memory import built, empty_batch
from vlmvqa.extras.planning.planner import Planner, Rows
from vlmvqa.extras.planning.strategy_memory import BITSANDBYTES, Training
from vlmvqa.extras.pretrained.model import PretrainedVLM
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import Document, TokenizedQuestion, build_row, pad_rows

STEPS = 3
MICRO_BATCHES = 2  # at most: from the second on nothing new is held


def verify(planner: Planner, checkpointing: bool) -> str:
    """Train for `STEPS` steps with random weights under ddp, alone; planned and measured peak, in a sentence.

    Raises:
        InputError: there is no GPU, or the plan says that its memory is too small.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "verify=true runs steps on a GPU, and there is none here; leave it out, or run it where one is"
        )
    device = torch.device("cuda")
    accumulation = min(planner.training.accumulation, MICRO_BATCHES)
    alone = planner.vary(gpus=1, training=replace(planner.training, accumulation=accumulation))
    plan = alone.memory("ddp", planner.rows.rows, checkpointing)
    here = torch.cuda.get_device_properties(device)
    if plan.needed > here.total_memory:
        raise InputError(
            f"one process needs {plan.needed / GIB:.1f} GiB and this {here.name} has {here.total_memory / GIB:.1f}; "
            "lower trainer.per_device_train_batch_size or train less of the model (trainable.language=none)"
        )
    with device:
        model = built(planner.settings).train()
    peft_adapters.prepare(model, planner.trainable, planner.adapt, device)
    if checkpointing:
        model.checkpoint_activations()
    model.to(device)
    torch.cuda.reset_peak_memory_stats(device)
    if isinstance(model, PretrainedVLM):
        rows = empty_batch(model, planner.shape, planner.rows.rows, planner.settings)
        rows = {name: column.to(device) for name, column in rows.items()}
    else:
        rows = batch(model, planner.rows, planner.images_per_row)
    train(model, rows, alone.training)
    measured = torch.cuda.max_memory_allocated(device)
    return (
        f"planned {plan.peak / GIB:.2f} GiB (at the {plan.moment}), measured {measured / GIB:.2f} GiB "
        f"({plan.peak / measured - 1:+.1%}): {STEPS} steps of {counted(planner.rows.rows, 'row')} on one {here.name}"
    )


def train(model: Model, batch: dict[str, Tensor], training: Training, steps: int = STEPS) -> None:
    """Optimizer steps on one batch, again and again, as the trainer makes them."""
    device = batch["pixel_values"].device.type
    half = torch.float16 if training.precision == "fp16" else torch.bfloat16
    optimizer = build_optimizer(model, training.optimizer)
    for _ in range(steps):
        for _ in range(training.accumulation):
            with torch.autocast(device, half, enabled=training.mixed):
                loss = model(**batch)["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """transformers' optimizer of that name, on the parameters that train."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name in BITSANDBYTES:
        from bitsandbytes.optim import AdamW

        bits = 8 if "8bit" in name else 32
        theirs: torch.optim.Optimizer = AdamW(trained, lr=1e-5, optim_bits=bits, is_paged=name.startswith("paged"))
        return theirs
    if name == "adamw_torch_8bit":
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        torchao: torch.optim.Optimizer = TorchaoAdamW8bit(trained, lr=1e-5)
        return torchao
    if name == "sgd":
        return torch.optim.SGD(trained, lr=1e-5, weight_decay=1e-4, foreach=True)
    fused = name == "adamw_torch_fused"
    return torch.optim.AdamW(trained, lr=1e-5, fused=fused, foreach=not fused)


def batch(model: VLM, rows: Rows, images_per_row: int = 1) -> dict[str, Tensor]:
    """A batch of the planned size; what it says is nothing."""
    device = next(model.parameters()).device
    question = TokenizedQuestion([0] * (rows.text_tokens - rows.answer_tokens), [0] * rows.answer_tokens)
    asked = rows.most_questions if rows.row_tokens is None else max(1, int(rows.questions))
    documents = [Document(image, [question] * asked) for image in range(rows.rows * images_per_row)]
    groups = [documents[row * images_per_row :][:images_per_row] for row in range(rows.rows)]
    columns = pad_rows([build_row(group, model.vision.tokens, model.mode) for group in groups], rows.row_tokens or 8)
    size = model.vision.image_size
    pixels = torch.zeros(len(documents), 3, size, size, device=device)
    return {"pixel_values": pixels, **{name: column.to(device) for name, column in columns.items()}}
