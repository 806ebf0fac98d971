"""The model that answers at an evaluation during training, imported at the first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from vlmvqa.models import checkpoint
from vlmvqa.models.interface import DTYPES, Model, cast_parameters
from vlmvqa.models.loading import answering_dtype

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer


@contextmanager
def answering_model(trainer: VqaTrainer) -> Iterator[Model]:
    """Yield the model to generate with, in the data type in which the saved model will answer.

    A model that is sharded, or trained in another data type, is copied: with shards, ranks would wait for each other at
    every token. The copy is held in memory in addition to the trained model.
    """
    settings, adapt = trainer.options.settings, trainer.options.adapt
    trained_in = settings.dtype if settings else str(trainer.dtype).removeprefix("torch.")
    dtype = trained_in if adapt and adapt.bits else answering_dtype("auto", trained_in, trainer.args.device)
    is_complete = trainer.dist.strategy not in ("fsdp", "zero3") and (adapt is not None or not trainer.dist.is_zero)
    if is_complete and dtype == trained_in:
        yield trainer.vlm
        return
    with torch.random.fork_rng(devices=[]):  # building must not advance the training's random state
        copy = _uninitialized_copy(trainer, dtype, keep_adapters=dtype == trained_in)
    parameters = dict(copy.named_parameters())
    with torch.no_grad():
        for name, weight in trainer.full_state.weights():
            parameters.pop(name).copy_(weight)
    assert not parameters, f"the copy has weights that the model does not have: {', '.join(parameters)}"
    yield copy.eval()


def _uninitialized_copy(trainer: VqaTrainer, dtype: str, keep_adapters: bool) -> Model:
    """Build a model of the trained one's architecture on its device.

    Args:
        dtype: data type of its weights.
        keep_adapters: leave adapters, and parts that train entirely next to them, in float32.
    """
    settings, adapt = trainer.options.settings, trainer.options.adapt
    assert settings is not None
    copy = checkpoint.uninitialized_like(trainer.vlm, dataclasses.replace(settings, dtype=dtype))
    if adapt is not None:
        from vlmvqa.extras.adapters import peft_adapters

        peft_adapters.attach(copy, adapt)
        if keep_adapters:
            trained = {name for name in trainer.saved_dtypes if "lora_" not in name}
            peft_adapters.keep_float32(copy, {trainer.vlm.part_of(name) for name in trained})
            return copy.to(trainer.args.device)
    return cast_parameters(copy, DTYPES[dtype]).to(trainer.args.device)
