"""Program of each rank: small trainings with the real classes, one after the other in one process group.

python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.worker FOLDER CASES.json

A case names a strategy and settings; rank 0 writes its result to FOLDER/results.json.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from tests import tiny
from tests.unit.test_trainer import examples
from vlmvqa import ranks
from vlmvqa.config import compatibility
from vlmvqa.config.schema import DistSettings
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.models.build import build
from vlmvqa.models.checkpoint import WEIGHTS
from vlmvqa.models.vlm import VLM, ModelSettings, ProjectorSettings
from vlmvqa.training import distributed, runtime_checks, zero
from vlmvqa.training.answering_model import answering_model
from vlmvqa.training.block_compilation import compile_blocks
from vlmvqa.training.checkpoint_state import local_tensor
from vlmvqa.training.log import read_log
from vlmvqa.training.optimizer import optimizer_for, set_trainable
from vlmvqa.training.run import COMPILE_KEYS
from vlmvqa.training.trainer import TrainerOptions, VqaTrainer


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        batch: rows per rank.
        resume: name of the case whose checkpoint it resumes from, and the step.
        saves: whether it writes checkpoints; false where a test only needs its losses.
        trainer: additional TrainingArguments.
    """

    name: str
    strategy: str = "ddp"
    offload: bool = False
    reduce_dtype: str = "float32"
    keep_gathered: bool = False
    trained: str = "full"  # or projector, lora, qlora
    optim: str = "adamw_torch"
    bf16: bool = False
    steps: int = 4
    batch: int = 2
    resume: tuple[str, int] | None = None
    saves: bool = True
    clip_percentile: int | None = None
    attention_pattern: str = "blockwise_prefix"
    vision: str = "plain"  # or fused, with a pixel shuffle
    row_tokens: int | None = None
    weighting: str = "token"
    trainer: dict[str, Any] | None = None


# Wide enough for 8-bit states, which start at 4,096 elements, per shard too.
WIDE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}


LORA = AdapterSettings(rank=8, targets=("language.*.q_proj", "language.*.down_proj"), compute_dtype="float32")
ADAPTED = {"lora": LORA, "qlora": replace(LORA, bits=4)}


def model_settings(attention_pattern: str, vision: str = "plain") -> ModelSettings:
    settings = tiny.settings(attention_pattern, initializer_range=0.02, **WIDE)
    if vision == "fused":
        settings = replace(
            settings,
            vision=replace(settings.vision, fused=(replace(settings.vision, layers=(0, 1)),)),
            projector=ProjectorSettings("pixel_shuffle", options={"layers": "normed"}),
        )
    return settings


def model(attention_pattern: str, vision: str = "plain") -> VLM:
    torch.manual_seed(0)
    return build(model_settings(attention_pattern, vision))


def run(case: Case, root: Path) -> dict[str, Any]:
    """Train; return the losses by step, the table of the runtime checks, and the path of the final weights."""
    trainer = make_trainer(case, root / case.name)
    start = str(root / case.resume[0] / f"checkpoint-{case.resume[1]}") if case.resume else None
    trainer.train(resume_from_checkpoint=start)
    log = [record for record in read_log(root / case.name / "log.jsonl") if "loss" in record]
    losses = {record["step"]: record["loss"] for record in log}
    if not case.saves:
        return {"losses": losses, "table": runtime_checks.check(trainer)}
    weights = root / case.name / f"checkpoint-{case.steps}" / WEIGHTS
    with answering_model(trainer) as whole:
        saved = load_file(weights)
        here = dict(whole.named_parameters())
        same = all(torch.equal(here[name].cpu(), weight.to(here[name].dtype)) for name, weight in saved.items())
    batch = trainer._prepare_inputs({"weights": torch.ones(1), "pixel_values": torch.ones(1)})
    return {
        "losses": losses,
        "norms": {record["step"]: record["grad_norm"] for record in log},
        "limits": trainer.clipping.norms,
        "table": runtime_checks.check(trainer),
        "weights": str(weights),
        "whole_model_is_the_checkpoint": same,
        "types_of_large_moments": sorted(large_moments(trainer.plain_optimizer())),
        "types_of_the_batch": {name: str(column.dtype) for name, column in batch.items()},
    }


def large_moments(optimizer: torch.optim.Optimizer) -> set[str]:
    """The types of the moments that an 8-bit optimizer could quantize."""
    moments = [state.get("state1", state.get("exp_avg")) for state in optimizer.state.values()]
    local = [local_tensor(moment) for moment in moments if moment is not None]
    quantized = [hasattr(one, "codes") or one.dtype == torch.uint8 for one in local if one.numel() >= 4096]
    return {"8 bits" if one else "32" for one in quantized}


def make_trainer(case: Case, folder: Path) -> VqaTrainer:
    dist = DistSettings(case.strategy, case.offload, reduce_dtype=case.reduce_dtype, keep_gathered=case.keep_gathered)
    vlm = model(case.attention_pattern, case.vision)
    adapt = ADAPTED.get(case.trained)
    if adapt is not None:
        peft_adapters.attach(vlm, adapt)
    if case.trained == "projector":
        set_trainable(vlm.part("vision"), "none", "vision")
        set_trainable(vlm.part("language"), "none", "language")
    arguments = make_arguments(case, dist, folder)
    enabled, backend, mode = ((case.trainer or {}).get(key) for key in COMPILE_KEYS)
    compiled = compile_blocks(vlm, backend, mode) if enabled or backend or mode else None
    if dist.is_zero:
        zero.correct_deepspeed()
    if case.strategy == "fsdp":
        distributed.shard(vlm, arguments.device, torch.bfloat16 if case.bf16 else None, dist)
    given = examples(32)
    tokenizer = train_tokenizer(given, 300)
    images = ImageSettings(28, (0.5,) * 3, (0.5,) * 3)
    images = replace(images, fused=(images,) * (len(vlm.vision.towers) - 1))
    processor = Processor(tokenizer, images, vlm.num_image_tokens, vlm.attention_pattern)
    most = 1 if case.attention_pattern == "prefix_lm" else None
    rows = RowSettings(row_tokens=case.row_tokens, questions_per_row=most, loss_weighting=case.weighting)
    return VqaTrainer(
        vlm,
        arguments,
        TrainDataset(given, processor, rows, BadRecords()),
        processor,
        TrainerOptions(
            dist=dist,
            clip_percentile=case.clip_percentile,
            settings=model_settings(case.attention_pattern, case.vision),
            adapt=adapt,
            compiled=compiled,
        ),
    )


def make_arguments(case: Case, dist: DistSettings, folder: Path) -> TrainingArguments:
    values = {
        "per_device_train_batch_size": case.batch,
        "max_steps": case.steps,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "optim": optimizer_for(case.optim, dist),
        "bf16": case.bf16,
        **({} if case.saves else {"save_strategy": "no"}),
        **(case.trainer or {}),
    }
    adapt = ADAPTED.get(case.trained)
    compatibility.refuse(compatibility.RunRequest(dist, values, tiny.settings(case.attention_pattern), adapt=adapt))
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        logging_steps=1,
        ddp_find_unused_parameters=False,
        deepspeed=zero.deepspeed_config(dist) if dist.is_zero else None,
        **{key: value for key, value in values.items() if key not in COMPILE_KEYS},
    )


def main(root: Path, cases: list[Case]) -> None:
    # torchao compiles its optimizer step; building inductor's C++ for it takes minutes on a CPU, so trace it only.
    # This is set here, not on import: tests that import this module compile for real.
    torch.compile = functools.partial(torch.compile, backend="eager")
    transformers_logging.set_verbosity_error()
    gc.freeze()  # excludes the imported modules from the garbage collection after each training
    needs_group = any(case.strategy != "ddp" for case in cases)
    distributed.start(DistSettings("zero2" if needs_group else "ddp"), cpu=True)
    results: dict[str, Any] = {}
    for case in cases:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by the training before
        try:
            results[case.name] = {"case": asdict(case), **run(case, root)}
        except InputError as error:
            results[case.name] = {"case": asdict(case), "refused": str(error)}
        except Exception:
            # Expected to fail on all ranks alike; a rank that fails alone ends the test.
            results[case.name] = {"case": asdict(case), "failed": traceback.format_exc()}
        gc.collect()
        ranks.barrier()
        if ranks.is_first():
            (root / "results.json").write_text(json.dumps(results, indent=1))
    gc.unfreeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**case) for case in json.loads(Path(sys.argv[2]).read_text())])
