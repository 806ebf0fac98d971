"""Memory and traffic of each training strategy that don't depend on the batch.

               parameters            gradients             optimizer states        buffers
ddp            full                  full, in buckets      full                    -
fsdp           sharded               sharded, fp32         sharded                 root, embedding, gathered blocks
zero1          full, half size       full and a partition  partition, fp32 weights reduction buckets
zero2          full, half size       partition             partition, fp32 weights reduction buckets
zero3          sharded, half size    partition             partition, fp32 weights reduction bucket, gathered parameters

Derived from the code of PyTorch 2.15 (FSDP2, DDP), accelerate 1.15, DeepSpeed 0.19.8, bitsandbytes 0.50 and torchao
0.18; "half size" applies to bf16 and fp16.

Legend: N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.planning.optimizer_memory import EIGHT_BIT, OPTIMIZERS, state_bytes, step_bytes
from vlmvqa.extras.planning.quantized_memory import QuantizedLinear
from vlmvqa.models.interface import PARTS, Model
from vlmvqa.training.optimizer import embedding_weights, is_8bit

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, MAX_LIVE, SUB_GROUP = int(5e8), int(1e9), int(1e9)


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        part: vision, projector or language.
        unit: Number of its block; None: outside all blocks, so in FSDP's root unit.
        shape: Its shape, not quantized.
        quantized: Bytes of its 4-bit form, the same under all strategies (None: not quantized).
        embedding: Whether it is an embedding's, whose moments stay in fp32.
    """

    part: str
    unit: int | None
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    quantized: int | None = None
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def stored_bytes(self, itemsize: int | None = None) -> int:
        """Return the bytes of the full weight; `itemsize` if it is converted to another dtype."""
        return self.quantized or self.numel * (itemsize or self.itemsize)

    def shard_numel(self, gpus: int) -> int:
        """Return the elements of the largest of FSDP2's N shards, split unevenly along the first dimension."""
        return ceil(self.shape[0] / gpus) * prod(self.shape[1:])


@dataclass(frozen=True)
class Training:
    """Trainer settings that memory depends on; `precision` is "bf16", "fp16" or "fp32"."""

    precision: str
    optimizer: str
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            near = suggest(self.optimizer, OPTIMIZERS)
            raise InputError(
                f"trainer.optim={self.optimizer} cannot be planned; use one of {', '.join(OPTIMIZERS)}{near}"
            )

    @property
    def mixed(self) -> bool:
        """Whether precision is mixed."""
        return self.precision != "fp32"


@dataclass(frozen=True)
class StrategyMemory:
    """Bytes on each GPU, and bytes that each GPU sends.

    Attributes:
        parameters, gradients, optimizer: Weights, gradients and optimizer states.
        buffers: Communication buffers and gathered weights, throughout the backward pass.
        step: Temporary memory of the optimizer's step, after activations are released.
        lasting: Buffers that also exist during the step.
        decoder, encoder: Additional buffers while the decoder's or the encoder's blocks run.
        reduction: Temporary memory of the last reduction of gradients, after activations are released.
        grows: Whether gradients are allocated during the backward pass instead of before it.
        host: Bytes in host memory, per GPU.
        gathered_each_pass, reduced_each_pass: Bytes sent to gather weights and to reduce gradients, per micro-batch,
            while other layers compute.
        exposed_each_pass: Bytes sent per micro-batch while nothing computes.
        reduced_each_step: Bytes sent to reduce gradients, in the step's last backward pass.
        sent_each_step: Bytes of weights sent after the optimizer's step.
        copied_each_pass: Bytes copied from and to host memory.
        stepped_on_host: Number of parameters that the optimizer updates in host memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    lasting: int = 0
    decoder: int = 0
    encoder: int = 0
    reduction: int = 0
    grows: bool = False
    host: int = 0
    gathered_each_pass: float = 0.0
    reduced_each_pass: float = 0.0
    exposed_each_pass: float = 0.0
    reduced_each_step: float = 0.0
    sent_each_step: float = 0.0
    copied_each_pass: float = 0.0
    stepped_on_host: int = 0

    def offloaded(self, stepped_on_host: int, more_on_host: int = 0) -> StrategyMemory:
        """Return the same with weights, gradients and states in host memory."""
        return replace(
            self,
            parameters=0,
            gradients=0,
            optimizer=0,
            step=0,
            host=self.parameters + self.gradients + self.optimizer + more_on_host,
            copied_each_pass=2 * self.parameters + self.gradients,
            stepped_on_host=stepped_on_host,
        )


def weights_of(model: Model) -> list[Weight]:
    """Return the parameters of a model, which may be on the meta device."""
    units = {}
    for number, block in enumerate(model.blocks):
        units.update({id(parameter): number for parameter in block.parameters()})
    layers = {id(layer.packed): layer for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    weights, embeddings = [], embedding_weights(model)
    for name, p in model.named_parameters():
        layer = layers.get(id(p))
        shape = tuple(p.shape) if layer is None else (layer.out_features, layer.in_features)
        quantized = None if layer is None else layer.stored_bytes
        part, unit, embedding = model.part_of(name), units.get(id(p)), name in embeddings
        weights.append(Weight(part, unit, shape, p.itemsize, p.requires_grad, quantized, embedding))
    return weights


def strategy_memory(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> StrategyMemory:
    """Return the memory of a strategy on each of N GPUs."""
    if dist.strategy == "ddp":
        return _ddp(weights, gpus, training)
    if dist.strategy == "fsdp":
        return _fsdp(weights, dist, gpus, training)
    return _zero(weights, dist, gpus, training)


def _ddp(weights: Sequence[Weight], gpus: int, training: Training) -> StrategyMemory:
    trained = [weight for weight in weights if weight.trained]
    gradients = sum(weight.stored_bytes() for weight in trained)
    return StrategyMemory(
        parameters=sum(weight.stored_bytes() for weight in weights),
        gradients=gradients,
        optimizer=_states(training.optimizer, trained),
        buffers=0,  # with gradient_as_bucket_view, which the trainer sets, the buckets are the gradients
        step=step_bytes(training.optimizer, _groups(trained, 1), _widest(trained)),
        grows=training.accumulation == 1 and gpus == 1,
        reduced_each_step=2 * (gpus - 1) / gpus * gradients,
    )


def _fsdp(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> StrategyMemory:
    trained = [weight for weight in weights if weight.trained]
    itemsize = _widest(trained)
    computed, reduced = (2, 4) if training.mixed else (itemsize, itemsize)
    reduced = 2 if dist.reduce_dtype == "bfloat16" else reduced
    # bitsandbytes cannot step on shards; training uses torchao instead.
    optimizer = "adamw_torch_8bit" if training.optimizer in EIGHT_BIT else training.optimizer
    gradients = sum(weight.shard_numel(gpus) * weight.itemsize for weight in trained)
    # Outside the blocks: the embedding's unit, and the root unit.
    root, root_trained = (sum(w.numel for w in group if w.unit is None) for group in (weights, trained))
    embeddings = (w.numel for w in weights if w.unit is None and w.embedding and w.part == "language")
    embedding = sum(embeddings) if reduced == computed else 0  # otherwise in the root unit: `distributed.shard`
    blocks, blocks_trained = (sum(w.numel for w in group if w.unit is not None) for group in (weights, trained))

    def block_buffers(part: str) -> int:
        # The running block and the prefetched one, or all that are kept: when the encoder's backward pass runs, the
        # decoder's are released. Also the gradients of a block and their input to the reduction.
        gathered = 2 * _largest_unit(weights, part)
        if dist.keep_gathered:
            gathered = sum(w.numel for w in weights if w.unit is not None and part in (w.part, "language"))
        return computed * gathered + (computed + reduced) * _largest_unit(trained, part)

    share = (gpus - 1) / gpus
    memory = StrategyMemory(
        parameters=sum(weight.shard_numel(gpus) * weight.itemsize for weight in weights),
        gradients=gradients,
        optimizer=_states(optimizer, trained, gpus),
        buffers=computed * root,
        decoder=block_buffers("language"),
        encoder=block_buffers("vision"),
        step=step_bytes(optimizer, _groups(trained, gpus), itemsize),
        # The gathered weights of root and embedding are freed before their gradients are reduced.
        reduction=root_trained * (computed + reduced) - computed * root,
        gathered_each_pass=share * computed * (embedding + (1 if dist.keep_gathered else 2) * blocks),
        reduced_each_pass=share * reduced * blocks_trained,
        # Nothing has been computed when the root is gathered, and nothing is left when these gradients are reduced.
        exposed_each_pass=share * (computed * (root - embedding) + reduced * root_trained),
    )
    return memory.offloaded(gradients // itemsize) if dist.offload else memory


def _zero(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> StrategyMemory:
    trained = [weight for weight in weights if weight.trained]
    zero = {"overlap_comm": True, **dist.options.get("zero_optimization", {})}
    itemsize = 2 if training.mixed else 4
    trained_numel = sum(weight.numel for weight in trained)
    largest = max((weight.numel for weight in trained), default=0)
    # Each parameter group is flattened and padded to 2N.
    apart = is_8bit(training.optimizer)  # embeddings are groups of their own
    partitions, embeddings = (
        [
            ceil(sum(group) / (2 * gpus)) * 2
            for group in _groups([weight for weight in trained if (apart and weight.embedding) == chosen], 1)
        ]
        for chosen in (False, True)
    )
    states = state_bytes(training.optimizer, partitions, embeddings)
    partitions += embeddings
    partition = sum(partitions)
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    # A bucket is flattened into a copy to be sent; a weight larger than a bucket is sent alone, at the end.
    copy = itemsize * min(bucket, trained_numel)
    # The step converts a group's gradients to fp32, from a flat copy that is freed before the optimizer runs.
    sub_group = min(max(partitions, default=0), SUB_GROUP if dist.stage == 3 else partition)
    optimizer_step = step_bytes(training.optimizer, [[sub_group]])
    sent_share = (gpus - 1) / gpus * itemsize
    memory = StrategyMemory(
        parameters=sum(weight.stored_bytes(itemsize) for weight in weights),
        gradients=itemsize * partition,
        optimizer=4 * partition + states,
        # Two buckets alternate; this pass's partition of gradients is added to the accumulated one.
        buffers=itemsize * ((2 if zero["overlap_comm"] else 1) * bucket + partition),
        decoder=copy,
        encoder=copy,
        reduction=2 * itemsize * largest if largest > bucket else 0,
        step=4 * sub_group + (max(itemsize * sub_group, optimizer_step) if training.mixed else optimizer_step),
    )
    if dist.stage == 1:
        return replace(
            memory,
            gradients=itemsize * trained_numel,
            step=memory.step - itemsize * (trained_numel - partition),
            reduced_each_step=sent_share * trained_numel,
            sent_each_step=sent_share * trained_numel,
        )
    if dist.stage == 2:
        return replace(memory, reduced_each_pass=sent_share * trained_numel, sent_each_step=sent_share * trained_numel)
    numel = sum(weight.numel for weight in weights)
    gathered = itemsize * min(numel, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
    memory = replace(
        memory,
        parameters=itemsize * sum(ceil(weight.numel / gpus) for weight in weights),
        buffers=itemsize * bucket,
        lasting=itemsize * bucket,
        decoder=copy + gathered,
        encoder=copy + gathered,
        gathered_each_pass=sent_share * 2 * numel,
        reduced_each_pass=sent_share * trained_numel,
    )
    return memory.offloaded(partition, more_on_host=4 * partition) if dist.offload else memory


def _states(optimizer: str, trained: Sequence[Weight], gpus: int = 1) -> int:
    """Return the bytes of optimizer states, which have the dtype of their weight."""

    def numels(itemsize: int, embedding: bool) -> list[int]:
        chosen = (weight for weight in trained if (weight.itemsize, weight.embedding) == (itemsize, embedding))
        return [weight.shard_numel(gpus) for weight in chosen]

    sizes = {weight.itemsize for weight in trained}
    return sum(state_bytes(optimizer, numels(size, False), numels(size, True), size) for size in sizes)


def _widest(trained: Sequence[Weight]) -> int:
    return max((weight.itemsize for weight in trained), default=4)


def _groups(weights: Sequence[Weight], gpus: int) -> list[list[int]]:
    """Return the elements of each tensor in the optimizer's groups: one per part, with and without weight decay."""
    keys = [(part, decays) for part in PARTS for decays in (True, False)]
    return [[w.shard_numel(gpus) for w in weights if (w.part, len(w.shape) > 1) == key] for key in keys]


def _largest_unit(weights: Sequence[Weight], part: str) -> int:
    units: dict[int, int] = {}
    for weight in weights:
        if weight.unit is not None and weight.part == part:
            units[weight.unit] = units.get(weight.unit, 0) + weight.numel
    return max(units.values(), default=0)
