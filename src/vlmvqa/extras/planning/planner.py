"""Plan the memory and speed of a training run under every strategy, without its GPUs.

Peak memory is the maximum over the backward pass, the last reduction of gradients and the optimizer's step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning.batches import Rows, RowShape, computed_blocks, num_image_tokens
from vlmvqa.extras.planning.gpus import GIB, Gpu
from vlmvqa.extras.planning.memory import PassProfile, Precision, build_on_meta, measure
from vlmvqa.extras.planning.published_sizes import TEMPLATE_TOKENS, Settings, known_config
from vlmvqa.extras.planning.strategy_memory import StrategyMemory, Training, Weight, strategy_memory, weights_of
from vlmvqa.extras.planning.time import Assumptions, Rates, StepWork, questions_per_second
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.models.interface import Model
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.masks import BLOCK

CONTEXT = 0.8 * GIB  # assumed size of CUDA's context and NCCL and cuBLAS workspaces
FRAGMENTATION = 0.05  # assumed share of allocated memory that is lost to fragmentation
HEADROOM = 0.95  # share of a GPU's memory that a recommended run may need
LONGEST = 1.5  # assumed ratio of the longest text in a micro-batch to the mean; VQAv2: 8 to 24 tokens, 13 on average

STRATEGIES: dict[str, DistSettings] = {
    **{name: DistSettings(name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")},
    "fsdp_offload": DistSettings("fsdp", offload=True),
    "zero3_offload": DistSettings("zero3", offload=True),
}

PROFILES: dict[str, PassProfile] = {}  # of this process; the arms of a study often have the same


class RunChoice(NamedTuple):
    """Strategy and batch of a run."""

    strategy: str
    rows: int
    checkpointing: bool
    accumulation: int


@dataclass(frozen=True)
class Plan:
    """Memory of a strategy on each GPU, in bytes, and its speed.

    Attributes:
        buffers: Communication buffers and gathered weights.
        temporary: Memory at the peak that no other attribute covers.
        peak: Peak allocated memory, reached in the phase `moment`.
        needed: The peak plus the allowances for CUDA and fragmentation.
        host: Host memory for all GPUs.
        largest: Most rows per GPU that fit, without and with activation checkpointing.
        questions_per_second: An estimate; None if it does not fit.
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
        """Whether the needed memory is available."""
        return self.needed <= self.capacity


@dataclass
class Planner:
    """Plans training runs of one model, row shape and type of GPU; `trainable` as in `optimizer.set_trainable`."""

    settings: Settings
    trainable: Mapping[str, str | int]
    rows: Rows
    training: Training
    gpu: Gpu
    gpus: int
    assumed: Assumptions = field(default_factory=Assumptions)
    strategies: dict[str, DistSettings] = field(default_factory=STRATEGIES.copy)
    adapt: AdapterSettings | None = None

    def __post_init__(self) -> None:
        rows = self.rows
        counts = {
            "plan.gpus": self.gpus,
            "trainer.per_device_train_batch_size": rows.rows,
            "trainer.gradient_accumulation_steps": self.training.accumulation,
            "plan.text_tokens": rows.text_tokens,
            **({} if rows.row_tokens is None else {"data.row_tokens": rows.row_tokens}),
        }
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name}={count} must be a whole number, 1 or more")
        if not 0 < rows.answer_tokens < rows.text_tokens:
            raise InputError(
                f"plan.answer_tokens={rows.answer_tokens} must be fewer than the question's {rows.text_tokens} tokens"
            )
        if self.rows.row_tokens is not None and isinstance(self.settings, PretrainedSettings):
            raise InputError(f"data.row_tokens: rows of {self.settings.pretrained} are not packed; set it to null")
        if self.adapt and self.adapt.bits and self.adapt.compute_dtype == "bfloat16" and not self.gpu.bf16:
            raise InputError(
                f"a {self.gpu.name} does not support bfloat16; set adapt.compute_dtype=float16 with trainer.bf16=false "
                "and trainer.fp16=true"
            )
        if self.quantized and self.training.precision == "fp16" and self.settings.dtype == "bfloat16":
            # 4-bit layers return the dtype of their input, and fp16 autocast doesn't cast bfloat16.
            raise InputError("trainer.fp16=true fails with bfloat16 and 4-bit weights; set model.dtype=float32")
        if self.training.precision == "bf16" and not self.gpu.bf16:
            raise InputError(
                f"a {self.gpu.name} does not support bfloat16; set trainer.bf16=false and trainer.fp16=true with "
                "dist=ddp or one of zero1 to zero3, or both to false for float32"
            )

    def add(self, dist: DistSettings) -> str:
        """Replace a strategy's settings, including DeepSpeed's options, and return its name.

        Raises:
            InputError: The strategy cannot run with these trainer settings and weights.
        """
        name = dist.strategy + ("_offload" if dist.offload else "")
        if name not in self.names():
            run = f"{self.training.precision}, {self.training.optimizer} and {self.settings.dtype} weights"
            run += ", in 4 bits" if self.quantized else ""
            raise InputError(f"dist={name} cannot be planned with {run}; use one of {', '.join(self.names())}")
        self.strategies[name] = dist
        return name

    @property
    def quantized(self) -> bool:
        """Whether the base's weights are in 4 bits."""
        return self.adapt is not None and self.adapt.bits is not None

    @cached_property
    def model(self) -> Model:
        """The model on the meta device."""
        return build_on_meta(self.settings, self.trainable, self.adapt)

    @cached_property
    def num_image_tokens(self) -> int:
        """Tokens per image in the decoder's row."""
        if isinstance(self.settings, PretrainedSettings):
            return num_image_tokens(self.settings)
        return self.rows.tiles * int(self.model.part("projector").module.output.tokens)

    @cached_property
    def weights(self) -> list[Weight]:
        """The model's parameters."""
        weights = weights_of(self.model)
        if not any(weight.trained for weight in weights):
            raise InputError("nothing is trained: every part is set to trainable=none; set one to all")
        return weights

    @cached_property
    def shape(self) -> RowShape:
        """The shape of a row: packed to `row_tokens`, or one image with its questions, padded to a multiple of 8."""
        rows = self.rows
        if rows.row_tokens is not None:
            supervised = ceil(self.images_per_row * rows.questions) * rows.answer_tokens
            return RowShape(rows.row_tokens, self.images_per_row * rows.tiles, supervised)
        tokens = self.fixed_tokens + rows.max_questions * (rows.text_tokens - 1)  # EOS is no input
        return RowShape(ceil(tokens / 8) * 8, rows.tiles, rows.max_questions * rows.answer_tokens)

    @cached_property
    def fixed_tokens(self) -> int:
        """Tokens of a row in addition to its questions."""
        images = self.images_per_row * self.num_image_tokens
        if isinstance(self.settings, PretrainedSettings):
            images += TEMPLATE_TOKENS[known_config(self.settings).model_type]
        return images

    @cached_property
    def images_per_row(self) -> int:
        """Images of average documents that fit in a packed row; 1 without packing."""
        text = self.rows.mean_text_tokens or self.rows.text_tokens
        document = self.num_image_tokens + self.rows.questions * text
        return max(1, int((self.rows.row_tokens or 0) // document))

    def profile(self, dist: DistSettings, checkpointing: bool) -> PassProfile:
        """Return the profile of a pass in the strategy's precision."""
        converted = self.training.mixed and dist.strategy != "ddp"
        precision = Precision(
            torch.bfloat16 if converted else None,
            self.training.mixed and not dist.strategy.startswith("zero"),
            torch.float16 if self.training.precision == "fp16" else torch.bfloat16,
        )
        settings = self.settings
        if isinstance(settings, ModelSettings):
            settings = replace(settings, attention_pattern="causal")  # patterns don't differ in memory
        key = repr((settings, self.trainable, self.adapt, self.shape, precision, checkpointing))
        if key not in PROFILES:
            model = build_on_meta(self.settings, self.trainable, self.adapt)
            PROFILES[key] = measure(model, self.settings, self.shape, precision, checkpointing)
        return PROFILES[key]

    def strategy_memory(self, dist: DistSettings) -> StrategyMemory:
        """Return the memory of a strategy that doesn't depend on the batch."""
        return strategy_memory(self.weights, dist, self.gpus, self.training)

    def memory(self, name: str, rows: int, checkpointing: bool) -> Plan:
        """Return a strategy's memory with `rows` rows per GPU."""
        dist = self.strategies[name]
        fixed, batch = self.strategy_memory(dist), self.profile(dist, checkpointing).at(rows)
        block = max(fixed.decoder, fixed.encoder)
        backward = max(batch.decoder_peak + fixed.decoder, batch.encoder_peak + fixed.encoder)
        weights = fixed.parameters + fixed.optimizer
        moments = {
            "backward": weights + fixed.buffers + fixed.gradients + backward,
            "reduction": weights + fixed.buffers + fixed.gradients + fixed.reduction,
            "step": weights + fixed.lasting + fixed.gradients + fixed.step,
        }
        if fixed.grows:
            moments["backward"] = weights + fixed.buffers + batch.peak_and_gradients
        moment = max(moments, key=lambda key: moments[key])
        temporary = {
            "backward": backward - block - batch.activations - batch.logits,
            "reduction": fixed.reduction,
            "step": fixed.step,
        }
        peak = moments[moment]
        return Plan(
            strategy=name,
            rows=rows,
            checkpointing=checkpointing,
            parameters=fixed.parameters,
            gradients=fixed.gradients,
            optimizer=fixed.optimizer,
            buffers=fixed.buffers + block,
            activations=batch.activations,
            logits=batch.logits,
            temporary=max(0, temporary[moment]),
            peak=peak,
            moment=moment,
            needed=int(peak * (1 + FRAGMENTATION) + CONTEXT),
            capacity=int(self.gpu.memory * GIB),
            host=fixed.host * self.gpus,
        )

    def max_rows(self, name: str, checkpointing: bool, share: float = 1.0) -> int:
        """Return the most rows per GPU that fit in a share of its memory."""
        fixed = self.strategy_memory(self.strategies[name])
        if fixed.parameters + fixed.optimizer + fixed.lasting > share * self.gpu.memory * GIB:
            return 0  # skip profiling a pass

        def too_many(rows: int) -> bool:
            plan = self.memory(name, rows, checkpointing)
            return plan.needed > share * plan.capacity

        return bisect_left(range(1, 2**20), True, key=too_many)

    @cached_property
    def step_tokens(self) -> int:
        """Tokens per row for the time: texts of mean length, padded to the longest of a micro-batch."""
        rows = self.rows
        if rows.row_tokens is not None or rows.mean_text_tokens is None:
            return self.shape.tokens
        multiple = BLOCK if self.model.attention == "flex" else 8
        longest = self.fixed_tokens + rows.max_questions * LONGEST * rows.mean_text_tokens
        return min(self.shape.tokens, ceil(longest / multiple) * multiple)

    @cached_property
    def padding(self) -> float:
        """Share of a row's tokens that is padding."""
        rows = self.rows
        text = rows.questions * (rows.mean_text_tokens or rows.text_tokens)
        return max(0.0, 1 - (self.fixed_tokens + self.images_per_row * text) / self.step_tokens)

    @cached_property
    def computed_pairs(self) -> float:
        """Share of a row's pairs of tokens that attention computes: FlexAttention skips blocks that nothing sees."""
        if not isinstance(self.settings, ModelSettings) or self.model.attention != "flex":
            return 1.0
        layout = replace(self.rows, row_tokens=self.step_tokens)
        return computed_blocks(layout, self.images_per_row, self.num_image_tokens, self.settings.attention_pattern)

    def pass_flops(self, run: RunChoice) -> dict[str, float]:
        """Return the FLOPs of a micro-batch by term: as traced, at the tokens per row and pairs that are computed."""
        dist, length = self.strategies[run.strategy], self.step_tokens / self.shape.tokens

        def total(checkpointing: bool) -> dict[str, float]:
            found = self.profile(dist, checkpointing)
            scale = {"decoder": length, "attention": length**2 * self.computed_pairs}
            flops = {name: run.rows * scale.get(name, 1.0) * row for name, row in found.row_flops.items()}
            return flops | {"output head": run.rows * self.shape.supervised * found.token_flops}

        flops = total(False)
        recomputed = sum(total(True).values()) - sum(flops.values()) if run.checkpointing else 0.0
        decoder = flops["decoder"]
        flops["decoder"] = decoder * (1 - self.padding)
        return flops | {"padding": decoder * self.padding, "recomputation": recomputed}

    def work(self, run: RunChoice) -> StepWork:
        """Return the work of an optimizer step."""
        questions = run.rows * run.accumulation * self.gpus * self.images_per_row * self.rows.questions
        memory = self.strategy_memory(self.strategies[run.strategy])
        return StepWork(questions, run.accumulation, self.pass_flops(run), memory, self.training.optimizer)

    @property
    def rates(self) -> Rates:
        """The constants of the time."""
        return Rates.of(self.gpu, self.training.mixed, self.assumed)

    def questions_per_second(self, run: RunChoice) -> float:
        """Estimate the training speed (`time.py`)."""
        return questions_per_second(self.work(run), self.rates)

    def plan(self, name: str, checkpointing: bool) -> Plan:
        """Return a strategy's plan for the configured batch."""
        plan = self.memory(name, self.rows.rows, checkpointing)
        run = RunChoice(name, self.rows.rows, checkpointing, self.training.accumulation)
        largest = self.max_rows(name, False), self.max_rows(name, True)
        return replace(
            plan, largest=largest, questions_per_second=self.questions_per_second(run) if plan.fits else None
        )

    def names(self) -> list[str]:
        """Return the strategies that can run.

        FSDP2 supports neither fp16 nor paged optimizer states nor blocks of two dtypes (adapters over bfloat16
        weights). 4-bit weights cannot be sharded.
        """
        mixed = self.adapt is not None and self.settings.dtype != "float32"
        fsdp = not (self.training.precision == "fp16" or self.training.optimizer.startswith("paged") or mixed)
        unsupported = (() if fsdp else ("fsdp",)) + (("fsdp", "zero3") if self.quantized else ())
        return [name for name in self.strategies if not name.startswith(unsupported)]

    def vary(self, gpus: int | None = None, training: Training | None = None) -> Planner:
        """Return a planner with other GPUs or trainer settings that shares model and rows."""
        other = replace(self, gpus=gpus or self.gpus, training=training or self.training)
        other.model, other.weights, other.shape = self.model, self.weights, self.shape
        return other

    def compare(self, checkpointing: bool) -> list[Plan]:
        """Return the plans of all strategies."""
        return [self.plan(name, checkpointing) for name in self.names()]

    def fastest(self, chosen: str) -> RunChoice | None:
        """Return the fastest run with the configured number of rows per step, or None if none fits.

        It needs at most `HEADROOM` of the memory. Strategies less than 5 % faster don't replace the chosen one: the
        estimate is not that accurate.
        """
        rows = self.rows.rows * self.training.accumulation
        runs = []
        for name in self.names():
            for checkpointing in (False, True):
                largest = min(self.max_rows(name, checkpointing, HEADROOM), rows)
                sizes = [size for size in range(1, largest + 1) if rows % size == 0]
                runs += [RunChoice(name, size, checkpointing, rows // size) for size in sizes]

        def speed(run: RunChoice) -> float:
            return self.questions_per_second(run) * (1.05 if run.strategy == chosen else 1.0)

        return max(runs, key=speed, default=None)
