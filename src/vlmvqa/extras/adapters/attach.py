"""Attach adapters to the model of a training run, and save the base model that they need."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from vlmvqa import fingerprint, ranks
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import Adapter, AdapterSettings
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import PARTS
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.training.checkpoint_loading import progress


def attach_adapters(config: TrainConfig, trained: TrainedModel, device: torch.device) -> Base | None:
    """Freeze the model except for the parts that `trainable` names, and attach the adapters of `adapt`.

    Returns:
        the base model of the adapters, if no folder holds it yet: it is random, or built from parts.
    """
    settings = config.adapt
    assert settings is not None
    _refuse_trainable_parts(config, settings)
    unsaved = Base(trained) if trained.started_from is None else None
    base = trained.started_from or {"model": f"../{checkpoint.BASE}", "weights": ""}
    trained.adapter = Adapter(settings, base["model"], base["weights"])
    paths = peft_adapters.prepare(trained.model, config.trainable, settings, device)
    ranks.print_on_rank0(peft_adapters.describe(trained.model, settings, paths))
    return unsaved


def settle_base(trained: TrainedModel, unsaved: Base | None, folder: Path, checkpoint: Path | None) -> str:
    """Save the base model unless it is stored elsewhere, and return the fingerprint of its weights.

    Args:
        unsaved: the base model, if no folder holds it yet.
        folder: where it is saved then.
        checkpoint: the checkpoint that the run resumes from.

    Raises:
        InputError: the adapters of the checkpoint were trained over another base model.
    """
    assert trained.adapter is not None
    if unsaved is not None:
        found = unsaved.write(folder, resumed=checkpoint is not None)
        trained.adapter = replace(trained.adapter, fingerprint=found)
    if checkpoint is not None and progress(checkpoint).get("base") != trained.adapter.fingerprint:
        raise InputError(
            f"{checkpoint} was trained over other weights than {trained.adapter.base} holds now; put back the base it "
            "was trained on, or start over with run.overwrite=true"
        )
    return trained.adapter.fingerprint


def _refuse_trainable_parts(config: TrainConfig, settings: AdapterSettings) -> None:
    for part in PARTS:
        choice = config.trainable[part]
        if choice == "none":
            continue
        if part == "language" or choice != "all":
            raise InputError(
                f"trainable.{part}={choice}: adapt={settings.method} freezes the model and trains adapters; only "
                "trainable.vision=all and trainable.projector=all may train as well; set none"
            )
        if any(target.startswith((f"{part}.", "*")) for target in settings.targets) or (
            settings.bits and part == "vision"
        ):
            raise InputError(
                f"trainable.{part}=all: its weights would also have adapters or be quantized to 4 bits; set none"
            )


class Base:
    """A model without adapters, held by rank 0 until the run's folder exists and it can be saved there."""

    def __init__(self, trained: TrainedModel) -> None:
        named = trained.model.named_parameters() if ranks.is_first() else ()
        self.trained, self.weights = replace(trained), {name: weight.detach().clone() for name, weight in named}

    def write(self, folder: Path, resumed: bool) -> str:
        """Save the base, unless a resumed run has saved it before, and return its fingerprint on every rank.

        An existing folder belongs to a run that ended before its first checkpoint, perhaps with another seed.
        """

        def replace_base() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            self.trained.save(folder, self.weights)

        if not resumed:
            ranks.broadcast_from_rank0(replace_base)
        return fingerprint.weights_in(folder)
