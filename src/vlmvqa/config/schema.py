"""Frozen dataclasses of the configuration: one for each command of the core, one for each group.

`compose.py` builds them from the values that Hydra composed. Functions receive the part that they need. The groups that
describe a model are next to it: `models.vlm.ModelSettings`, `models.interface.GenerationSettings`. An extra keeps its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmvqa.errors import InputError, suggest
from vlmvqa.models.interface import GenerationSettings

if TYPE_CHECKING:
    from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
    from vlmvqa.models.interface import Settings as AnyModelSettings
else:  # built by their own packages, which are imported when a config names them
    AdapterSettings = AnyModelSettings = Any

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
REDUCE_DTYPES = ("float32", "bfloat16")
MIXTURE = "mixture"  # the `data.source` of several tasks


@dataclass(frozen=True)
class RunSettings:
    """The `run` group: the run's name, its folder, and whether an existing one is replaced."""

    name: str | None = None
    dir: str = ""
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """The folder that receives everything a run writes."""
        return Path(self.dir).expanduser()


@dataclass(frozen=True)
class DataSettings:
    """The `data` group; conf/data/vqav2.yaml and conf/data/mixture.yaml document its keys."""

    source: str
    root: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    synthetic: bool = False
    hub: str | None = None
    hub_config: str | None = None
    hub_images: str | None = None
    streaming: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    shards: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    min_steps: int = 0
    prompt: str = "answer en {question}\n"
    metric: str = "vqa_accuracy"
    metric_options: Mapping[str, Any] = field(default_factory=dict)
    extra_metrics: Mapping[str, Any] = field(default_factory=dict)
    target: str = "most_common"
    resize: str = "squash"
    reduced_decoding: bool = False
    tiles: Mapping[str, Any] | None = None
    max_text_tokens: int | None = 64
    max_new_tokens: int | None = None  # read by conf/decoding
    questions_per_row: int | None = None
    row_tokens: int | None = None
    length_window: int = 1
    feature_cache: str | None = None
    on_bad_record: str = "error"
    expected_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    archives: Sequence[Mapping[str, str]] = ()
    parts: Mapping[str, DataSettings] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> Mapping[str, DataSettings]:
        """The tasks of a mixture by name; for a single dataset, itself under the empty name."""
        return self.parts or {"": self}

    @property
    def prompts(self) -> dict[str, str]:
        """The prompt template of each source.

        Raises:
            InputError: two tasks of one source have different ones, of which a saved model could keep only one.
        """
        found: dict[str, str] = {}
        for task in self.tasks.values():
            if found.setdefault(task.source, task.prompt) != task.prompt:
                raise InputError(
                    f"two parts of source {task.source} have different prompts ({found[task.source]!r}, "
                    f"{task.prompt!r}); give both the same"
                )
        return found

    @property
    def extra(self) -> dict[str, Mapping[str, Any]]:
        """The metrics printed in addition to the task's own, with their options."""
        return {name: options for name, options in self.extra_metrics.items() if options is not None}

    @property
    def single(self) -> DataSettings:
        """The same settings, for commands that take one dataset.

        Raises:
            InputError: it is a mixture.
        """
        if self.source == MIXTURE:
            raise InputError(f"data=mixture is several datasets; choose one of them: {', '.join(self.parts)}")
        return self


@dataclass(frozen=True)
class DistSettings:
    """The `dist` group.

    Attributes:
        strategy: one of `STRATEGIES`.
        offload: keep parameters and optimizer states in host memory (fsdp, zero3).
        options: further keys of DeepSpeed's own configuration (zero1 to zero3).
        timeout_minutes: how long ranks wait for each other before the run stops and names the missing ranks.
        reduce_dtype: data type in which mixed precision sums gradients over the ranks, one of `REDUCE_DTYPES` (fsdp).
        keep_gathered: keep the gathered weights of blocks from the forward to the backward pass (fsdp).
    """

    strategy: str = "ddp"
    offload: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_minutes: float = 10.0
    reduce_dtype: str = "float32"
    keep_gathered: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            near = suggest(self.strategy, STRATEGIES)
            raise InputError(f"dist.strategy={self.strategy} is unknown; use one of {', '.join(STRATEGIES)}{near}")
        if self.offload and self.strategy not in ("fsdp", "zero3"):
            raise InputError(f"dist.offload is for fsdp and zero3, not for {self.strategy}; use dist=zero3_offload")
        if self.reduce_dtype not in REDUCE_DTYPES:
            near = suggest(self.reduce_dtype, REDUCE_DTYPES)
            raise InputError(
                f"dist.reduce_dtype={self.reduce_dtype} is unknown; use one of {', '.join(REDUCE_DTYPES)}{near}"
            )
        if self.options and not self.is_zero:
            raise InputError(f"dist.options are DeepSpeed's, and {self.strategy} is not; leave them out")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the strategy."""
        return self.strategy.startswith("zero")

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.strategy.removeprefix("zero"))


@dataclass(frozen=True)
class TrainConfig:
    """Config of launch/train.py; conf/train.yaml documents its keys.

    Attributes:
        trainer: transformers' TrainingArguments, by their own names.
        init_from: saved models that training starts from, by `model` or part.
        stages: the stages of the training; the other settings are those of the last one.
        given: the keys that the command line sets.
    """

    run: RunSettings
    data: DataSettings
    model: AnyModelSettings
    trainer: Mapping[str, Any]
    decoding: GenerationSettings
    dist: DistSettings | None = None
    adapt: AdapterSettings | None = None
    init_from: Mapping[str, str] | None = None
    resume: str | None = None
    resume_force: bool = False
    seed: int = 0
    hub_id: str | None = None
    logger: str | Sequence[str] | None = None
    log_samples: int = 0
    report: bool = True
    attributions: int = 0
    trainable: Mapping[str, str | int] = field(default_factory=dict)
    learning_rates: Mapping[str, float | None] = field(default_factory=dict)
    copy_images: bool = False
    loss_weighting: str = "token"
    clip_percentile: int | None = None
    stages: Mapping[str, TrainConfig] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
