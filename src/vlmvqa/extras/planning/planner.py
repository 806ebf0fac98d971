"""Will it fit, and what should be set? Memory and speed of a training run under every strategy, without its GPUs.

    memory.py       activations, logits and FLOPs of a pass, counted on the real model without weights (ledger.py)
    four_bits.py    weights in 4 bits
    pretrained.py   pretrained models: their published sizes, and their rows
    resident.py     what a strategy keeps of weights, gradients and optimizer states, and what it sends
    gpus.py         what the GPU has and how fast it is
    planner.py      the sum of them: the plan of a strategy, all side by side, the largest batch, the fastest run
    report.py       what is said of it

The worst moment counts: the backward pass, the last reduction of gradients, or the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning import published_sizes
from vlmvqa.extras.planning.gpus import GIB, Gpu
from vlmvqa.extras.planning.memory import Arithmetic, Footprint, RowShape, Settings, measure, row_shape, skeleton
from vlmvqa.extras.planning.strategy_memory import Resident, Training, Weight, resident, weights_of
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.hub import OWN_CODE
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.vlm import VLM, ModelSettings

CONTEXT = 0.8 * GIB  # CUDA's context, NCCL and cuBLAS workspaces: an allowance, not counted
FRAGMENTATION = 0.05  # of what is allocated: memory that lies between tensors, an allowance too
ROOM = 0.95  # of a GPU's memory that a recommended run may need
UTILISATION = 0.35  # of the GPU's rate that training reaches: an assumption
HOST_RATE = 20e9  # bytes a second that an optimizer in host memory moves, an assumption
HOST_STEP = 60  # bytes it moves for a parameter

STRATEGIES: dict[str, DistSettings] = {
    **{name: DistSettings(name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")},
    "fsdp_offload": DistSettings("fsdp", offload=True),
    "zero3_offload": DistSettings("zero3", offload=True),
}

# Hub ids whose sizes are those of the config class's defaults, so that they need no network.
DEFAULT_SIZES = {"google/gemma-2-2b": "gemma2", "google/gemma-2-2b-it": "gemma2"}


@dataclass(frozen=True)
class Rows:
    """What a micro-batch is made of.

    Attributes:
        rows: on each GPU (`trainer.per_device_train_batch_size`).
        questions: asked of an image, on average.
        text_tokens: of a question, with answer and EOS.
        answer_tokens: of its answer and EOS.
        row_tokens: what a row is filled up to with images and their questions (None: an image a row).
    """

    rows: int
    questions: float
    text_tokens: int
    answer_tokens: int = 4
    row_tokens: int | None = None

    @property
    def most_questions(self) -> int:
        return max(1, -int(-self.questions // 1))


@dataclass(frozen=True)
class Plan:
    """A strategy's memory on each GPU, in bytes, and its speed.

    Attributes:
        buffers: communication buffers and gathered weights.
        temporary: what the worst moment needs beside the columns before it.
        peak: what is allocated at the worst moment, `moment`.
        needed: the peak with the allowances for CUDA and fragmentation.
        host: in host memory, of all GPUs.
        largest: rows a GPU that fit, without and with activation checkpointing.
        questions_per_second: an estimate; None where it does not fit.
    """

    strategy: str
    rows: int
    checkpointing: bool
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    temporary: int
    peak: int
    moment: str
    needed: int
    capacity: int
    host: int
    largest: tuple[int, int] = (0, 0)
    questions_per_second: float | None = None

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity


@dataclass
class Planner:
    """Plans for one model, one kind of row and one kind of GPU.

    Args:
        trainable: "all", "none" or the number of last blocks, of each part; beside adapters, "all" or "none".
        utilisation: of the GPU's rate that training is taken to reach.
        adapt: the adapters that train beside a frozen base, if any.
    """

    settings: Settings
    trainable: Mapping[str, str | int]
    rows: Rows
    training: Training
    gpu: Gpu
    gpus: int
    utilisation: float = UTILISATION
    strategies: dict[str, DistSettings] = field(default_factory=STRATEGIES.copy)
    adapt: AdapterSettings | None = None
    _footprints: dict[tuple[Arithmetic, bool], Footprint] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        counts = {
            "plan.gpus": self.gpus,
            "trainer.per_device_train_batch_size": self.rows.rows,
            "trainer.gradient_accumulation_steps": self.training.accumulation,
            "data.row_tokens": self.rows.row_tokens,
            "plan.text_tokens": self.rows.text_tokens,
        }
        for name, count in counts.items():
            if name == "data.row_tokens" and count is None:
                continue
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name}={count} must be a whole number, 1 or more")
        if self.rows.row_tokens is not None and isinstance(self.settings, PretrainedSettings):
            raise InputError(f"data.row_tokens: rows of {self.settings.pretrained} are not packed; set it to null")
        if self.adapt and self.adapt.bits and self.adapt.compute_dtype == "bfloat16" and not self.gpu.bf16:
            raise InputError(
                f"a {self.gpu.name} does not compute in bfloat16; set adapt.compute_dtype=float16 beside "
                "trainer.bf16=false and trainer.fp16=true"
            )
        if self.packed and self.training.precision == "fp16" and self.settings.dtype == "bfloat16":
            # 4-bit layers answer in the type they are asked in, and autocast joins no bfloat16 under fp16.
            raise InputError("trainer.fp16=true over bfloat16 weights beside 4-bit ones fails; set model.dtype=float32")
        if self.training.precision == "bf16" and not self.gpu.bf16:
            raise InputError(
                f"a {self.gpu.name} does not compute in bfloat16; set trainer.bf16=false and trainer.fp16=true with "
                "dist=ddp or one of zero1 to zero3, or leave both false for float32"
            )

    def add(self, dist: DistSettings) -> str:
        """Plan a strategy as it is set, DeepSpeed's options and all; its name."""
        name = dist.strategy + ("_offload" if dist.offload else "")
        if name not in self.names():
            kind = f"{self.training.precision}, {self.training.optimizer} and {self.settings.dtype} weights"
            kind += ", in 4 bits" if self.packed else ""
            raise InputError(f"dist={name} cannot be planned under {kind}; use one of {', '.join(self.names())}")
        self.strategies[name] = dist
        return name

    @property
    def packed(self) -> bool:
        """Whether weights are in 4 bits."""
        return self.adapt is not None and self.adapt.bits is not None

    @cached_property
    def model(self) -> Model:
        """Without weights."""
        model: Model = skeleton(self.settings, self.trainable, self.adapt)
        return model

    @cached_property
    def image_tokens(self) -> int:
        """Of an image, in the decoder's row."""
        if isinstance(self.settings, PretrainedSettings):
            return published_sizes.image_tokens(published_sizes.known_config(self.settings), self.settings)
        return int(self.model.vision.tokens)  # type: ignore[arg-type]

    @cached_property
    def weights(self) -> list[Weight]:
        weights = weights_of(self.model)
        if not any(weight.trained for weight in weights):
            raise InputError("nothing trains: every part is set to trainable=none; set one to all")
        return weights

    @cached_property
    def shape(self) -> RowShape:
        rows = self.rows
        if isinstance(self.settings, PretrainedSettings):  # a row is a question
            config = published_sizes.known_config(self.settings)
            return RowShape(published_sizes.row_tokens(config, self.settings, rows.text_tokens), 1, rows.answer_tokens)
        if rows.row_tokens is None:
            assert isinstance(self.model, VLM)
            return row_shape(self.model, 1, rows.most_questions, rows.text_tokens, rows.answer_tokens)
        # Full, whatever its documents are: more tokens than this it never has.
        supervised = ceil(self.images_per_row * rows.questions) * rows.answer_tokens
        return RowShape(rows.row_tokens, self.images_per_row, supervised)

    @cached_property
    def images_per_row(self) -> int:
        """As many as usual ones fit (1 where rows are not filled)."""
        document = self.image_tokens + self.rows.questions * self.rows.text_tokens
        return max(1, int((self.rows.row_tokens or 0) // document))

    def footprint(self, dist: DistSettings, checkpointing: bool) -> Footprint:
        """A pass as the strategy computes it."""
        converted = self.training.mixed and dist.strategy != "ddp"
        arithmetic = Arithmetic(
            torch.bfloat16 if converted else None,
            self.training.mixed and not dist.strategy.startswith("zero"),
            torch.float16 if self.training.precision == "fp16" else torch.bfloat16,
        )
        key = arithmetic, checkpointing
        if key not in self._footprints:
            model = skeleton(self.settings, self.trainable, self.adapt)
            self._footprints[key] = measure(model, self.shape, arithmetic, checkpointing, self.settings)
        return self._footprints[key]

    def resident(self, dist: DistSettings) -> Resident:
        return resident(self.weights, dist, self.gpus, self.training)

    def memory(self, name: str, rows: int, checkpointing: bool) -> Plan:
        """A strategy's memory at so many rows a GPU."""
        dist = self.strategies[name]
        kept, held = self.resident(dist), self.footprint(dist, checkpointing).at(rows)
        passing = max(held.decoder_peak + kept.decoder, held.encoder_peak + kept.encoder)
        stays = kept.parameters + kept.optimizer
        moments = {
            "backward": stays + kept.buffers + kept.gradients + passing,
            "reduction": stays + kept.buffers + kept.gradients + kept.reduction,
            "step": stays + kept.lasting + kept.gradients + kept.step,
        }
        if kept.grows:
            moments["backward"] = stays + kept.buffers + held.peak_and_gradients
        moment = max(moments, key=lambda key: moments[key])
        temporary = {
            "backward": passing - max(kept.decoder, kept.encoder) - held.activations - held.logits,
            "reduction": kept.reduction,
            "step": kept.step,
        }
        peak = moments[moment]
        return Plan(
            strategy=name,
            rows=rows,
            checkpointing=checkpointing,
            parameters=kept.parameters,
            gradients=kept.gradients,
            optimizer=kept.optimizer,
            buffers=kept.buffers + max(kept.decoder, kept.encoder),
            activations=held.activations,
            logits=held.logits,
            temporary=max(0, temporary[moment]),
            peak=peak,
            moment=moment,
            needed=int(peak * (1 + FRAGMENTATION) + CONTEXT),
            capacity=int(self.gpu.memory * GIB),
            host=kept.host * self.gpus,
        )

    def largest(self, name: str, checkpointing: bool, share: float = 1.0) -> int:
        """The most rows a GPU that fit into a share of its memory."""
        kept = self.resident(self.strategies[name])
        if kept.parameters + kept.optimizer + kept.lasting > share * self.gpu.memory * GIB:
            return 0  # no need to count a pass

        def fits(rows: int) -> bool:
            plan = self.memory(name, rows, checkpointing)
            return plan.needed <= share * plan.capacity

        low, high = 0, 1
        while fits(high) and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def seconds(self, name: str, rows: int, checkpointing: bool, accumulation: int) -> float:
        """An estimate of an optimizer step's time: what is sent and copied in a pass hides behind what is computed."""
        dist = self.strategies[name]
        kept = self.resident(dist)
        rate = self.gpu.half if self.training.mixed else self.gpu.single
        flops = self.footprint(dist, checkpointing).flops(rows)
        computing = flops / (rate * 1e12 * self.utilisation)
        sending = kept.sent_each_pass / (self.gpu.link * 1e9) if self.gpus > 1 else 0.0
        copying = kept.copied_each_pass / (self.gpu.host * 1e9)
        last = kept.sent_each_step / (self.gpu.link * 1e9) + kept.stepped_on_host * HOST_STEP / HOST_RATE
        return accumulation * max(computing, sending + copying) + last

    def questions_per_second(self, name: str, rows: int, checkpointing: bool, accumulation: int) -> float:
        asked = rows * accumulation * self.gpus * self.images_per_row * self.rows.questions
        return asked / self.seconds(name, rows, checkpointing, accumulation)

    def plan(self, name: str, checkpointing: bool) -> Plan:
        """A strategy's plan at the batch that was asked for."""
        plan = self.memory(name, self.rows.rows, checkpointing)
        speed = self.questions_per_second(name, self.rows.rows, checkpointing, self.training.accumulation)
        return replace(
            plan,
            largest=(self.largest(name, False), self.largest(name, True)),
            questions_per_second=speed if plan.fits else None,
        )

    def names(self) -> list[str]:
        """The strategies that can run.

        FSDP2 cannot under fp16, with paged states, nor where a block's weights are of two types, as bfloat16 ones
        beside adapters are. Weights in 4 bits cannot be sharded.
        """
        mixed = self.adapt is not None and self.settings.dtype != "float32"
        fsdp = not (self.training.precision == "fp16" or self.training.optimizer.startswith("paged") or mixed)
        left_out = (() if fsdp else ("fsdp",)) + (("fsdp", "zero3") if self.packed else ())
        return [name for name in self.strategies if not name.startswith(left_out)]

    def vary(self, gpus: int | None = None, training: Training | None = None) -> Planner:
        """Plans of the same model and rows for other GPUs or another trainer; what was counted is kept."""
        other = replace(self, gpus=gpus or self.gpus, training=training or self.training)
        other.model, other.weights, other.shape = self.model, self.weights, self.shape
        other._footprints = self._footprints
        return other

    def compare(self, checkpointing: bool) -> list[Plan]:
        """All strategies side by side."""
        return [self.plan(name, checkpointing) for name in self.names()]

    def fastest(self, chosen: str) -> tuple[str, int, bool, int] | None:
        """Strategy, rows a GPU, checkpointing and accumulation of the fastest run with as many rows a step.

        It leaves room (`ROOM`), and takes smaller micro-batches than were asked for only where no strategy holds them.
        The chosen strategy is kept where others are less than a twentieth faster, which an estimate cannot tell.
        """
        rows = self.rows.rows * self.training.accumulation
        found = []
        for name in self.names():
            for checkpointing in (False, True):
                most = min(self.largest(name, checkpointing, ROOM), rows)
                sizes = [size for size in range(1, most + 1) if rows % size == 0]
                found += [(name, size, checkpointing, rows // size) for size in sizes]
        as_large = [run for run in found if run[1] >= self.rows.rows]

        def worth(run: tuple[str, int, bool, int]) -> float:
            return self.questions_per_second(*run) * (1.05 if run[0] == chosen else 1.0)

        return max(as_large or found, key=worth, default=None)


def known_architecture(settings: ModelSettings) -> ModelSettings:
    """The settings with a language model whose sizes can be told without the hub.

    Raises:
        InputError: its config is neither known nor on this machine.
    """
    name = settings.language.name
    settings = replace(settings, language=replace(settings.language, loss="chunked"))  # the kernel needs no more
    if name in DEFAULT_SIZES:
        return replace(settings, language=replace(settings.language, name=DEFAULT_SIZES[name]))
    if name not in CONFIG_MAPPING_NAMES:
        try:
            AutoConfig.from_pretrained(name, local_files_only=True, **OWN_CODE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the sizes of model.language.name={name} are not on this machine, and a plan uses no network; give an "
                "architecture, model.language.name=llama, and its sizes as model.language.overrides.hidden_size=..."
            ) from error
    return settings
