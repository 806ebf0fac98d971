"""Save a checkpoint, whose files are the same under every strategy; `checkpoint_loading.py` loads it.

model.safetensors       full weights in the model's own dtypes; with adapters, only the trained weights
optimizer.safetensors   AdamW's full moments in fp32 by parameter name, and their number of steps
scheduler.pt            the learning rate schedule
scaler.pt               fp16's loss scale under ddp (DeepSpeed's isn't saved; it adapts within a few steps)
rng_state*.pth          random state of each rank
progress.json           number of ranks, global batch, last gradient norms, fingerprint of the adapters' base model
trainer_state.json      transformers' own: step, epoch, best score
config.json, tokenizer  as in `model/` (models/checkpoint.py), so that a checkpoint loads like a saved model
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from vlmvqa import ranks
from vlmvqa.models.checkpoint import WEIGHTS
from vlmvqa.models.interface import Model

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer


MOMENTS, PROGRESS = "optimizer.safetensors", "progress.json"


def full_weights(trainer: VqaTrainer) -> dict[str, Tensor]:
    """Return the full weights to save, in host memory and in their original dtypes; empty except on rank 0."""
    gathered = trainer.full_state.weights(trainer.saved_dtypes)
    return {name: weight.to("cpu", trainer.saved_dtypes[name]) for name, weight in gathered if ranks.is_first()}


def save_weights(trainer: VqaTrainer, path: Path) -> None:
    """Save the full weights in the model's own dtypes; every rank must call this, rank 0 writes."""
    weights = full_weights(trainer)
    if ranks.is_first():
        named = {trainer.vlm.saved_name(name): weight.contiguous() for name, weight in weights.items()}
        save_file(named, path, {"format": "pt"})


def save(trainer: VqaTrainer, folder: Path) -> None:
    """Save everything that resuming a run needs; every rank must call this."""
    save_weights(trainer, folder / WEIGHTS)
    moments = {name: moment.float().cpu() for name, moment in trainer.full_state.moments() if ranks.is_first()}
    trainer._save_rng_state(str(folder))
    if not ranks.is_first():
        return
    contiguous = {name: moment.contiguous() for name, moment in moments.items()}
    save_file(contiguous, folder / MOMENTS, {"step": str(trainer.full_state.step())})
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
    trainer._save_scaler(str(folder))
    progress = {
        "world_size": ranks.world_size(),
        "global_batch": trainer.global_batch,
        "norms": trainer.clipping.norms,
        "base": trainer.base_fingerprint,
    }
    (folder / PROGRESS).write_text(json.dumps(progress) + "\n")
    trainer.state.stateful_callbacks["TrainerControl"] = trainer.control.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    if trainer.describe is not None:
        trainer.describe(folder)


# ---- full weights and moments
#
# Why `torch.distributed.checkpoint.state_dict` is not used for DDP and FSDP2:
# - optimizer: `get_optimizer_state_dict` returns 8-bit moments as their library stores them (bitsandbytes' nested
#   `__bnb_optimizer_quant_state__`, torchao's `OptimState8bit`), while checkpoints contain fp32 moments that any
#   optimizer loads. `set_optimizer_state_dict` first steps the optimizer with zero gradients, which needs the memory of
#   all gradients when a run resumes, and it expects `param_groups` in the file.
# - weights: `get_model_state_dict` also lists the quantization tensors of 4-bit base weights, and returns all weights
#   at once. `FullState.weights` yields one at a time, so evaluating a sharded model needs no second full copy.
# Instead, DTensor's primitives (`full_tensor`, `distribute_tensor`) process one tensor at a time.

KEYS = ("exp_avg", "exp_avg_sq")  # AdamW's moments
NamedTensors = Iterator[tuple[str, Tensor]]


class FullState:
    """Full state of a model and its optimizer that are replicated (DDP, one process) or sharded by FSDP2.

    Every rank must call the methods that return or load tensors, and consume their iterators to the end.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def weights(self, names: Container[str] | None = None) -> NamedTensors:
        """Yield the full weights, all of them or those in `names`."""
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, _gather(local_tensor(parameter.detach()), parameter)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy full weights into the model; parameters without an entry keep their values."""
        for name, parameter in self.model.named_parameters():
            if name in weights:
                local_tensor(parameter.detach()).copy_(_local_shard(weights[name], parameter))

    def moments(self) -> NamedTensors:
        """Yield AdamW's full moments in fp32 as "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"."""
        for name, parameter in self._trained_parameters():
            for key, local in read_moments(self.optimizer.state[parameter]).items():
                yield f"{key}/{name}", _gather(local, parameter)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load what `moments` yielded after `step` optimizer steps."""
        for group, settings in enumerate(self.optimizer.param_groups):
            for parameter in settings["params"]:
                name = self.names[id(parameter)]
                if f"exp_avg/{name}" in moments:
                    local = {key: _local_shard(moments[f"{key}/{name}"], parameter) for key in KEYS}
                    write_moments(self.optimizer, group, parameter, local, step)

    def step(self) -> int:
        """Return the number of steps that the moments have accumulated."""
        states = list(self.optimizer.state.values())
        return int(states[0].get("step", 0)) if states else 0

    def optimized_elements(self) -> int:
        """Return the number of elements that the optimizer updates; sharded parameters count in full."""
        return sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights in a full parameter, which may be packed in 4 bits or partitioned by ZeRO-3."""
    quantized = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into a byte
    return quantized.shape.numel() if quantized is not None else int(getattr(parameter, "ds_numel", parameter.numel()))


def _gather(local: Tensor, like: Tensor) -> Tensor:
    """All-gather a tensor that is sharded like `like`."""
    if not isinstance(like, DTensor):
        return local.view(like.shape)
    mesh, placements = like.device_mesh, like.placements
    # Offloaded shards are in host memory, but the mesh's process group gathers on its own device.
    local = local.to(mesh.device_type)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def _local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of `full`, sharded like `like`; every rank holds `full`, so nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


# ---- the moments in an optimizer's state


def local_tensor(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, or any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a parameter's local moments in fp32, by `KEYS`; empty before the first step and for SGD."""
    if "state1" in state or hasattr(local_tensor(state.get("exp_avg")), "codes"):
        from vlmvqa.training import quantized_moments

        return quantized_moments.read(state)
    return {key: local_tensor(state[key]).float() for key in KEYS if key in state}


def write_moments(
    optimizer: torch.optim.Optimizer, group: int, parameter: Tensor, moments: Mapping[str, Tensor], step: int
) -> None:
    """Create a parameter's optimizer state from its local fp32 moments.

    Args:
        group: index into `optimizer.param_groups` of the parameter's group.
        moments: by `KEYS`, each of the local parameter's size.
        step: number of steps that the moments have accumulated.
    """
    if not type(optimizer).__module__.startswith("torch."):
        from vlmvqa.training import quantized_moments

        quantized_moments.write(optimizer, group, parameter, moments, step)
        return
    settings = optimizer.param_groups[group]
    device = parameter.device if settings.get("fused") or settings.get("capturable") else torch.device("cpu")
    state = {key: torch.zeros_like(parameter) for key in KEYS}
    for key, stored in state.items():
        local_tensor(stored).copy_(moments[key].reshape(local_tensor(stored).shape))
    optimizer.state[parameter] = {"step": torch.full((), step, dtype=torch.float32, device=device), **state}
