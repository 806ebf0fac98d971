"""Every file of conf/ is loaded, and what it says is what the library takes."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from tests.configs import train_config, values
from tests.conftest import ROOT
from vlmvqa.config import compatibility
from vlmvqa.config.compose import build_settings, to_dict, to_yaml
from vlmvqa.config.early_checks import argument_types
from vlmvqa.config.overrides import compose
from vlmvqa.config.schema import DataSettings, DistSettings
from vlmvqa.data.mixture import SHARED
from vlmvqa.data.tasks import data_settings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import ATTENTION, FEED_FORWARD
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.paths import CONF
from vlmvqa.ranks import launcher_choice
from vlmvqa.training.run import training_arguments
from vlmvqa.training.zero import deepspeed_config

GIVEN = {
    "data=mixture": ["data.parts.vqav2.root=somewhere", "data.parts.gqa.root=somewhere"],
    "model=pretrained": ["model.pretrained=somewhere"],
}
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "hydra_quiet")
CHOICES = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in CONF.rglob("*/*.yaml")
    if path.parent.name not in ("study", "sweep") and not path.stem.startswith("reproduce_")
)  # studies and sweeps: tests/unit/test_study.py, test_sweep_search.py; reproductions are evaluations


@pytest.mark.parametrize("name", PRIMARY)
def test_every_script_has_its_config(name: str) -> None:
    needed = {"eval": ["data=shapes"], "prepare": ["check"]}.get(name, [])
    assert "run" in values(name, *needed)
    assert (CONF.parent / ("evaluation/helm/run.py" if name == "helm" else f"launch/{name}.py")).exists()


def test_the_limits_of_the_page_are_those_of_the_library() -> None:
    assert build_settings(Limits, values("serve")["limits"], "limits") == Limits()


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_builds(choice: str, tmp_path: Path) -> None:
    given = GIVEN.get(choice, ["data.root=somewhere"])
    config = train_config(choice, *given, "run.name=x", f"run.dir={tmp_path}", "+trainer.use_cpu=true")
    training_arguments(config, DistSettings())
    assert set(config.trainable) == {"vision", "projector", "language"}
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_a_reproduction_is_an_evaluation() -> None:
    found = values("eval", "experiment=reproduce_paligemma_vqav2", "data.root=somewhere")
    assert (found["checkpoint"], found["split"]) == ("google/paligemma-3b-ft-vqav2-224", "test-dev")
    assert found["expected"]["score"] == 83.19 and found["data"]["source"] == "vqav2"


def test_the_recipe_to_the_letter(tmp_path: Path) -> None:
    """The published recipe's table, against what the experiment resolves to."""
    given = ("data.root=somewhere", "run.name=x", f"run.dir={tmp_path}", "+trainer.use_cpu=true")
    config = train_config("experiment=vlm_vqa_4xa10g", *given)
    assert isinstance(config.model, ModelSettings) and config.dist is not None
    vision, data, dist = config.model.vision, config.data, config.dist
    assert (vision.name, vision.image_size) == ("vit_base_patch14_dinov2.lvd142m", 224)
    assert (config.model.projector.kind, config.model.projector.dropout) == ("linear", 0.1)
    assert config.model.language.name == "google/gemma-2-2b"
    assert (data.source, data.questions_per_row, data.max_text_tokens) == ("vqav2", 1, 64)
    assert (dist.strategy, dist.offload) == ("fsdp", False)
    args = training_arguments(config, dist)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (6, 10)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-5, 1e-4, 1.0)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.num_train_epochs) == ("cosine", 10, 1)
    assert config.trainer["optim"] == "adamw_bnb_8bit" and args.optim == "adamw_torch_8bit"  # under FSDP2
    assert config.clip_percentile == 95


def test_the_fast_recipe_changes_rows_communication_and_optimizer_alone() -> None:
    recipe, fast = (train_config(f"experiment=vlm_vqa_4xa10g{end}", "data.root=somewhere") for end in ("", "_fast"))
    assert recipe.dist == DistSettings("fsdp") and fast.dist is not None
    assert fast.dist == dataclasses.replace(recipe.dist, reduce_dtype="bfloat16", keep_gathered=True)
    assert isinstance(fast.model, ModelSettings) and fast.model.language.attention == "flex"
    assert (fast.data.row_tokens, fast.data.questions_per_row) == (3712, None)
    changed = {key for key in fast.trainer if fast.trainer[key] != recipe.trainer.get(key)}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert changed == {*batch, "optim", "torch_compile"} and {fast.trainer[key] for key in batch} == {1}
    assert fast.clip_percentile == recipe.clip_percentile and fast.learning_rates == recipe.learning_rates


def test_one_h200_trains_packed_rows_with_flex_attention_and_compiled_blocks() -> None:
    config = train_config("experiment=vlm_vqa_h200", "data.root=somewhere")
    assert isinstance(config.model, ModelSettings) and config.dist is None
    assert config.model.language.attention == "flex"
    assert (config.data.row_tokens, config.data.questions_per_row) == (4096, None)
    assert config.trainer["torch_compile"] and not config.trainer["activation_checkpointing"]
    assert config.trainer["optim"] == "adamw_torch_fused"
    with pytest.raises(InputError, match="FlexAttention has no backward pass on the CPU"):
        compatibility.check(dataclasses.replace(config, trainer={**config.trainer, "use_cpu": True}), DistSettings())


# FACTS of the published recipes: model, data, what trains, and the trainer's settings.
TUNED = {
    "paligemma_qlora_vqav2_10pct": (
        ("google/paligemma-3b-pt-224", "vqav2", 4, "bfloat16"),
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 2,
            "learning_rate": 2e-5,
            "weight_decay": 1e-6,
            "warmup_steps": 2,
            "adam_beta2": 0.999,
            "bf16": True,
            "save_steps": 1000,
            "save_total_limit": 1,
        },
    ),
    "paligemma_lora_docvqa": (("google/paligemma-3b-pt-224", "docvqa", None, "bfloat16"), {}),
    "idefics2_qlora_docvqa": (
        ("HuggingFaceM4/idefics2-8b", "docvqa", 4, "float16"),
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 16,
            "num_train_epochs": 3,
            "learning_rate": 2e-4,
            "fp16": True,
            "bf16": False,
            "logging_steps": 100,
            "eval_strategy": "steps",
            "eval_steps": 500,
            "save_steps": 500,
        },
    ),
    **{
        f"paligemma_qlora_{name}": (
            ("google/paligemma-3b-pt-448", source, 4, "bfloat16"),
            {
                "per_device_train_batch_size": 4,
                "num_train_epochs": epochs,
                "learning_rate": 2e-4,
                "activation_checkpointing": True,
                "report_to": "wandb",
            },
        )
        for name, source, epochs in (
            ("coco", "coco_captions", 3),
            ("docvqa", "docvqa", 5),
            ("gqa", "gqa", 3),
            ("vqav2", "vqav2", 3),
        )
    },
}


@pytest.mark.parametrize("name", TUNED)
def test_the_fine_tuning_recipes_to_the_letter(name: str) -> None:
    (pretrained, source, bits, dtype), trainer = TUNED[name]
    config = train_config(f"experiment={name}", "data.root=somewhere")
    data, model, adapt, trained = config.data, config.model, config.adapt, config.trainer
    assert isinstance(model, PretrainedSettings) and adapt is not None
    assert (model.pretrained, model.dtype, data.source) == (pretrained, dtype, source)
    assert (data.questions_per_row, data.row_tokens) == (1, None)
    assert (adapt.bits, adapt.quantization, adapt.compute_dtype) == (bits, "nf4", dtype)
    assert {target.rpartition(".")[2] for target in adapt.targets} == {*ATTENTION, *FEED_FORWARD}
    assert {key: trained[key] for key in trainer} == trainer
    if "10pct" in name:
        assert data.train_split == "train[:10%]"
    else:
        assert (adapt.rank, adapt.alpha) == (16, 32)
    if source == "docvqa":
        assert data.max_text_tokens == 256
    if name == "idefics2_qlora_docvqa":
        assert adapt.dropout == 0.1 and data.metric == "anls" and set(data.extra) == {"cider", "clip_similarity"}


def test_the_transfer_settings_to_the_letter() -> None:
    config = train_config("experiment=paligemma_transfer", "data.root=somewhere")
    trained, data = config.trainer, config.data
    assert isinstance(config.model, PretrainedSettings) and config.adapt is None
    assert config.model.pretrained == "google/paligemma-3b-pt-224"
    assert (data.prompt, data.max_text_tokens, data.target) == ("answer en {question}\n", 32, "sampled")
    assert 4 * trained["per_device_train_batch_size"] * trained["gradient_accumulation_steps"] == 256
    assert (trained["lr_scheduler_type"], trained["warmup_steps"]) == ("cosine", 0.05)
    assert (trained["max_grad_norm"], trained["learning_rate"], trained["num_train_epochs"]) == (1.0, 1e-5, 10)


def test_a_text_where_a_group_belongs_is_refused() -> None:
    """Unquoted, the shell makes two overrides of {a:1,b:2}, and the last one, a text, would count."""
    with pytest.raises(InputError, match=r"data\.options must be a group of keys, .* quote the braces"):
        train_config("data.options=train_images:200", "data=vqav2", "data.root=x")


def test_only_groups_that_are_open_take_new_keys() -> None:
    assert compose(["data.options.other=1"], "train").arguments == ["++data.options.other=1"]
    with pytest.raises(InputError, match=r"there is no key 'model\.vision\.weights\.x'"):
        compose(["model.vision.weights.x=1"], "train")


@pytest.mark.parametrize("path", sorted((CONF / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_dataset_has_the_keys_of_images_and_rows(path: Path) -> None:
    assert set(SHARED) - {"max_new_tokens"} <= set(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert compose([f"data={path.stem}", "data.tiles.max=4"], "train").jobs[0].values["data"]["tiles"] == {"max": 4}


def test_a_group_may_be_given_with_and_without_a_plus() -> None:
    assert compose(["+dist=fsdp"], "train").arguments == compose(["dist=fsdp"], "train").arguments == ["dist=fsdp"]
    assert train_config("dist=zero2").dist == DistSettings("zero2")


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, ["a=b"], None),
        ({}, ["--local_rank=0", "a=b"], ("zero2", "the deepspeed launcher")),
        ({"ACCELERATE_USE_FSDP": "true"}, [], ("fsdp", "accelerate's config file")),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
            [],
            ("fsdp_offload", "accelerate's config file"),
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            [],
            ("zero3", "accelerate's config file"),
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
            [],
            ("zero3_offload", "accelerate's config file"),
        ),
    ],
)
def test_what_a_launcher_implies(
    environment: dict[str, str], arguments: list[str], expected: tuple[str, str] | None
) -> None:
    assert launcher_choice(environment, arguments) == expected


def test_a_launcher_that_contradicts_the_command_is_refused() -> None:
    def strategy(choice: str, name: str, *given: str) -> str:
        dist = train_config(*given, launcher=(choice, name)).dist
        assert dist is not None
        return dist.strategy

    with pytest.raises(InputError, match="accelerate's config file sets fsdp, the command sets zero2"):
        strategy("fsdp", "accelerate's config file", "dist=zero2")
    assert strategy("fsdp", "accelerate's config file") == "fsdp"
    assert strategy("zero2", "the deepspeed launcher") == "zero2"
    assert strategy("zero2", "the deepspeed launcher", "dist=fsdp") == "fsdp"  # deepspeed starts anything
    with pytest.raises(InputError, match="zero1_offload, which is not in conf/dist"):
        strategy("zero1_offload", "accelerate's config file")


def test_accelerates_precision_must_be_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match="accelerate's config file sets bf16, the run sets no"):
        compatibility.check(train_config(), DistSettings())


def test_deepspeeds_own_keys_go_under_options() -> None:
    settings = DistSettings(
        "zero2", options={"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": 1}
    )
    config = deepspeed_config(settings)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000 and config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] == 1
    for wrong, said in (
        (("ddp", True), "dist.offload is for fsdp and zero3"),
        (("fsdp", False, {"a": 1}), "dist.options are DeepSpeed's"),
        (("fsdpp",), "dist.strategy=fsdpp is unknown"),
    ):
        with pytest.raises(InputError, match=said):
            DistSettings(*wrong)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("change", [{"reduce_dtype": "bfloat16"}, {"keep_gathered": True}])
def test_keys_of_fsdp_are_refused_where_they_would_be_ignored(strategy: str, change: dict[str, Any]) -> None:
    def refuse(dist: DistSettings) -> None:
        compatibility.refuse(compatibility.RunRequest(dist, {}, ModelSettings()))

    refuse(DistSettings("fsdp", **change))
    (key,) = change
    with pytest.raises(InputError, match=rf"dist\.{key}=\w+ is for fsdp, not for {strategy}"):
        refuse(DistSettings(strategy, **change))
    with pytest.raises(InputError, match=r"dist\.reduce_dtype=bf16 is unknown"):
        DistSettings("fsdp", reduce_dtype="bf16")
    with pytest.raises(InputError, match=r"dist\.keep_gathered=true needs the memory that dist\.offload=true saves"):
        refuse(DistSettings("fsdp", offload=True, keep_gathered=True))


def test_a_key_that_only_a_yaml_has_is_an_error_too() -> None:
    with pytest.raises(InputError, match="data has no key 'rooot'; did you mean 'root'"):
        build_settings(DataSettings, {"source": "vqav2", "rooot": "x"}, "data")
    with pytest.raises(InputError, match=r"data\.root is missing"):
        build_settings(DataSettings, {"source": "vqav2"}, "data")
    with pytest.raises(InputError, match=r"model\.vision must be a group of keys"):
        build_settings(ModelSettings, {"vision": "dinov2"}, "model")
    with pytest.raises(InputError, match=r"model\.vision has no key 'nmae'"):
        build_settings(ModelSettings, {"vision": {"nmae": "x"}}, "model")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.learning_rte=1", "did you mean 'trainer.learning_rate=1'"),
        ("lerning_rate=1", "did you mean 'trainer.learning_rate=1'"),
        ("data.rooot=x", "did you mean 'data.root=x'"),
        ("model=tinny", "did you mean 'tiny'"),
        ("modle=tiny", "did you mean 'model=tiny'"),
        ("+trainer.foo=1", "no key 'trainer.foo'"),
        ("run.dri=x", "did you mean 'run.dir=x'"),
        ("sede=1", "did you mean 'seed=1'"),
        ("lr=1e-4", "did you mean 'trainer.learning_rate=1e-4'"),
        ("trainer.lr=1e-4", "did you mean 'trainer.learning_rate=1e-4'"),
        ("learning_rate=1e-4", "did you mean 'trainer.learning_rate=1e-4'"),
        ("batch_size=8", "did you mean 'trainer.per_device_train_batch_size=8'"),
        ("bs=8", "did you mean 'trainer.per_device_train_batch_size=8'"),
        ("epochs=3", "did you mean 'trainer.num_train_epochs=3'"),
        ("trainer.num_epochs=3", "did you mean 'trainer.num_train_epochs=3'"),
        ("wd=0.1", "did you mean 'trainer.weight_decay=0.1'"),
        ("max_steps=9", "did you mean 'trainer.max_steps=9'"),
        ("warmup=9", "did you mean 'trainer.warmup_steps=9'"),
        ("grad_accum=2", "did you mean 'trainer.gradient_accumulation_steps=2'"),
        ("output_dir=out", "did you mean 'run.dir=out'"),
        ("model_name=x/y", "did you mean 'model.language.name=x/y'"),
        ("fp16=true", "did you mean 'trainer.fp16=true'"),
        ("image_size=64", r"did you mean 'data.options.image_size=64' or 'model.vision.image_size=64'"),
        ("model.name=x", r"did you mean 'model.language.name=x' or 'model.vision.name=x'"),
        ("resume_from_checkpoint=a", "did you mean 'resume=auto'"),
        ("tiny", "'tiny' is not a setting; give settings as key=value"),
    ],
)
def test_misspelt_overrides_suggest(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        compose([override], "train")


def test_any_training_argument_may_be_given() -> None:
    assert compose(["trainer.adam_beta2=0.95", "seed=1"], "train").arguments == ["++trainer.adam_beta2=0.95", "seed=1"]
    assert compose(["model.vision.overrides.reg_tokens=4"], "train").arguments[0].startswith("++model")


def test_slices_need_no_quotes() -> None:
    data = values("train", "data.train_split=train[:10%]", "data.root=/a b/c")["data"]
    assert (data["train_split"], data["root"]) == ("train[:10%]", "/a b/c")


def test_repeated_questions_become_a_list() -> None:
    given = ("question=What's it, a 'cat'?", "checkpoint=x", "question=how many\\few?")
    assert values("predict", *given)["question"] == ["What's it, a 'cat'?", "how many\\few?"]


def test_every_package_is_installed() -> None:
    """They are listed, because they lie below two folders."""
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    names = {".".join(path.parent.relative_to(ROOT / "src").parts) for path in (ROOT / "src").rglob("__init__.py")}
    # Folders of the checkout that a wheel holds inside the package.
    for path in (ROOT / "evaluation").rglob("__init__.py"):
        names.add(".".join(["vlmvqa", *path.parent.relative_to(ROOT).parts]))
    names |= {"vlmvqa.launch", "vlmvqa.conf"}
    assert names == set(listed["options"]["packages"].split())


def test_the_evaluation_folder_has_one_name() -> None:
    """Under a second one, HELM's client would load the weights again."""
    assert Path(importlib.import_module("vlmvqa.evaluation").__file__ or "") == ROOT / "evaluation" / "__init__.py"
    with pytest.raises(ImportError, match=r"import vlmvqa.evaluation, not evaluation; HELM is started with"):
        importlib.import_module("evaluation")


@pytest.mark.parametrize("written", [r"so: {question}\n", "so: {question}\n"])
def test_a_new_line_in_a_prompt_may_be_written_as_in_yaml(written: str) -> None:
    """In a shell's double quotes, backslash and n stay two characters."""
    values = {"source": "vqav2", "root": "/data", "prompt": written}
    assert data_settings(values).prompt == "so: {question}\n"


def test_the_trainers_keys_are_read_without_importing_it() -> None:
    """Those of early stopping are set next to them."""
    stopping = ["early_stopping_patience", "early_stopping_threshold"]
    assert list(argument_types()) == [field.name for field in dataclasses.fields(TrainingArguments)] + stopping
