"""Unsupported combinations are refused with the nearest supported one; the built model matches the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from tests import tiny
from tests.configs import train_config
from tests.unit.test_trainer import model, trainer
from vlmvqa.config.compatibility import RunRequest, refuse
from vlmvqa.config.compose import to_yaml
from vlmvqa.config.schema import DistSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.ranks import LAUNCH
from vlmvqa.training import checkpoints, distributed
from vlmvqa.training.optimizer import optimizer_for
from vlmvqa.training.rendezvous import slurm_task
from vlmvqa.training.run_folder import STARTED, is_resumed, open_run
from vlmvqa.training.runtime_checks import check


def asked(
    dist: str = "ddp", attention_pattern: str = "blockwise_prefix", attention: str = "dense", **more: Any
) -> RunRequest:
    settings = tiny.settings(attention_pattern)
    changes = {"attention": attention, "loss": more.pop("loss", "chunked")}
    language = type(settings.language)(**{**vars(settings.language), **changes})
    values = {key: more.pop(key) for key in list(more) if key in RunRequest.__dataclass_fields__}
    changed = type(settings)(**{**vars(settings), "language": language, "dtype": more.pop("dtype", "float32")})
    return RunRequest(DistSettings(dist), more, changed, **values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (asked(optim="lion"), "trainer.optim=lion has no states that every strategy can save; use one of"),
        (asked("zero2", optim="adamw_torch_8bit"), "use adamw_bnb_8bit"),
        (asked(fp16=True), "trainer.fp16=true needs a GPU; use trainer.bf16=true"),
        (asked("fsdp", fp16=True, gpu=True), "use trainer.bf16=true, or dist=zero2"),
        (asked(bf16=True, gpu=True, bf16_works=False), "this card does not compute in bfloat16; use trainer.fp16=true"),
        (asked("zero3", dtype="bfloat16"), "needs trainer.bf16=true"),
        (asked(dtype="float16"), "weights that train are kept in float32; set model.dtype=float32 (trainer.fp16=true)"),
        (asked(torch_compile_backend="inducter"), "is unknown; use inductor; did you mean 'inductor'"),
        (asked(torch_compile_mode="fast"), "must be one of default, lite, reduce-overhead"),
        (asked(torch_compile_mode="default", torch_compile_backend="eager"), "with the backend inductor"),
        (asked(attention="flex"), "no backward pass on the CPU; use model.language.attention=dense"),
        (
            asked(attention_pattern="prefix_lm", questions_per_row=4),
            "set data.questions_per_row=1, or model.attention_pattern=blockwise_prefix",
        ),
        (
            asked(attention_pattern="prefix_lm", tiles={"tile_attention": "tile"}),
            "makes images and question one block, so tiles cannot be blocks; leave data.tiles.tile_attention out",
        ),
        (asked(cached=True, trained_vision="none", tiles={}), "leave data.tiles and data.resize=letterbox"),
        (asked(cached=True, trained_vision="none", resize="letterbox"), "one input without padding"),
        (asked(activation_checkpointing=True, resize="letterbox"), "recomputes no activations where patches"),
        (asked(loss="fused"), "its kernel needs a GPU; use model.language.loss=chunked"),
        (
            asked(cached=True, trained_vision="4"),
            "trainable.vision=4: an encoder whose output is cached cannot train; set",
        ),
        (asked(average_tokens_across_devices=False), "would weigh ranks equally, not tokens; leave it out"),
    ],
)
def test_what_cannot_work_is_refused(given: RunRequest, said: str) -> None:
    with pytest.raises(InputError) as error:
        refuse(given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        asked("fsdp", optim="adamw_bnb_8bit", bf16=True),
        asked("zero3", optim="adamw_bnb_8bit", bf16=True, dtype="bfloat16"),
        asked("zero2", fp16=True, gpu=True),
        asked(attention="flex", gpu=True),
        asked(attention_pattern="prefix_lm", questions_per_row=1),
        asked(attention_pattern="prefix_lm", questions_per_row=4, copy_images=True),
        asked(attention_pattern="causal", questions_per_row=4),
        asked(cached=True, trained_vision="none"),
    ],
)
def test_what_works_is_not(given: RunRequest) -> None:
    refuse(given)


def test_a_restart_is_recognised_by_its_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart by torchrun resumes the run that this launch started, and no other."""
    config = train_config()
    assert not is_resumed(tmp_path, config)
    monkeypatch.setenv(LAUNCH, "this")
    assert not is_resumed(tmp_path, config)  # nothing there yet, or another launch's run
    (tmp_path / STARTED).write_text("that")
    assert not is_resumed(tmp_path, config)
    (tmp_path / STARTED).write_text("this")
    assert is_resumed(tmp_path, config)


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        ({}, {"num_train_epochs": 8}, None),
        ({}, {"max_steps": 30}, None),  # 4 epochs are 20 steps
        ({"max_steps": 20}, {"max_steps": 21}, None),
        (
            {},
            {"num_train_epochs": 3},
            "trainer.num_train_epochs was 4 and is now 3 (a run can be extended, not shortened",
        ),
        ({}, {"max_steps": 20}, "trainer.max_steps was -1 and is now 20 (a run can"),
        ({"max_steps": 20}, {"max_steps": -1}, "trainer.max_steps was 20 and is now -1 (a run can"),
        ({"max_steps": 20}, {"max_steps": 20, "num_train_epochs": 8}, "raise trainer.max_steps where it is set"),
        ({}, {"num_train_epochs": 8, "optim": "sgd"}, "changed settings: trainer.optim was adamw and is now sgd; give"),
    ],
)
def test_a_resumed_run_may_only_be_extended(
    tmp_path: Path, was: dict[str, Any], now: dict[str, Any], refused: str | None
) -> None:
    def config(trainer: dict[str, Any]) -> TrainConfig:
        given = {"num_train_epochs": 4, "max_steps": -1, "optim": "adamw", **trainer}
        return train_config("resume=auto", *(f"trainer.{key}={value}" for key, value in given.items()))

    with checkpoints.writing(tmp_path, 20) as folder:
        (folder / "progress.json").write_text(json.dumps({"global_batch": 8}))
        (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 20}))
    (tmp_path / "config.yaml").write_text(to_yaml(config(was)))
    if refused:
        with pytest.raises(InputError) as error:
            open_run(tmp_path, config(now), 8, 1)
        assert refused in str(error.value)
    else:
        checkpoint, told = open_run(tmp_path, config(now), 8, 1)
        assert checkpoint == tmp_path / "checkpoint-20" and told == [f"resuming from {checkpoint}"]


def test_one_process_under_fsdp_starts_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """accelerate warns if OMP_NUM_THREADS is unset, which users need not set."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    for name in group:
        monkeypatch.setenv(name, "")  # so that monkeypatch unsets it afterwards
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    PartialState._reset_state()
    distributed.start(DistSettings("fsdp"), cpu=True)
    try:
        PartialState(cpu=True)
        assert [str(warning.message) for warning in recwarn] == []
    finally:
        torch.distributed.destroy_process_group()
        PartialState._reset_state()
        torch.set_num_threads(threads)


def test_what_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes; install it with: pip install 'vlmvqa\[8bit\]'"):
        refuse(asked(optim="adamw_bnb_8bit"))
    with pytest.raises(InputError, match=r"needs DeepSpeed; install it with: pip install 'vlmvqa\[deepspeed\]'"):
        refuse(asked("zero2"))


def test_torchao_steps_where_bitsandbytes_cannot() -> None:
    assert optimizer_for("adamw_bnb_8bit", DistSettings("fsdp")) == "adamw_torch_8bit"
    assert optimizer_for("adamw_bnb_8bit", DistSettings("zero2")) == "adamw_bnb_8bit"
    assert optimizer_for("adamw_torch", DistSettings("fsdp")) == "adamw_torch"


def test_a_difference_stops_before_the_first_step(tmp_path: Path) -> None:
    """A model that isn't sharded, an optimizer without one parameter, another optimizer than configured."""
    given = trainer(tmp_path / "a", model())
    given.dist = DistSettings("fsdp")
    with pytest.raises(InputError, match="FSDP2 units: the config asks for 7, but 0 was built"):
        given.train()
    given = trainer(tmp_path / "b", model())
    given.create_optimizer()
    assert given.optimizer is not None
    given.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(InputError, match=r"parameters in the optimizer: the config asks for"):
        given.train()
    given = trainer(tmp_path / "c", model(), optim="adamw_bnb_8bit")
    given.args.optim = "adamw_torch"
    given.create_optimizer()
    given.args.optim = "adamw_bnb_8bit"
    with pytest.raises(
        InputError, match=r"optimizer: the config asks for AdamW of bitsandbytes, but AdamW of torch\.optim"
    ):
        given.train()
    assert not list(tmp_path.glob("*/log.jsonl")) or not any(file.read_text() for file in tmp_path.glob("*/log.jsonl"))


def test_the_table_of_one_process(tmp_path: Path) -> None:
    given = trainer(tmp_path, model(), optim="adamw_bnb_8bit")
    given.train()
    lines = check(given).splitlines()
    assert lines[0].split(maxsplit=1)[1] == "one process, 1 rank on cpu"
    states = "8-bit moments in blocks of 256, fp32 for embeddings and below 4,096 elements"
    assert f"adamw_bnb_8bit, {states}, norm clipped to 1" in lines[4]
    assert lines[6].endswith("2 rows (2 a rank x 1 accumulated x 1 rank)")


def test_a_slurm_task_knows_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\n[ \"$3\" = 'node[1-2]' ] && printf 'node1\\nnode2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {
        "SLURM_JOB_ID": "31234",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    assert slurm_task(step) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "21234",
    }
    assert slurm_task(step | {"RANK": "0"}) == {}  # torchrun under srun
    assert slurm_task(step | {"SLURM_STEP_NUM_TASKS": "1"}) == {} and slurm_task({}) == {}
