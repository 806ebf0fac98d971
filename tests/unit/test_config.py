"""Every file of conf/ is loaded, and what it says is what the library takes."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf
from train import training_arguments

from command_line import CONF, check_overrides, collect
from from_config import DataSettings, group
from vlmvqa.errors import InputError
from vlmvqa.models.generation import Decoding
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.settings import build_settings

CHECKED = {"data": DataSettings, "decoding": Decoding}
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "hydra_quiet")
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


def compose(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.mark.parametrize("name", PRIMARY)
def test_every_script_has_its_config(name: str) -> None:
    needed = ["data=shapes"] if name == "eval" else []
    assert "run" in compose(name, *needed)
    assert (CONF.parent / "launch" / f"{name}.py").exists()


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_builds(choice: str, tmp_path: Path) -> None:
    name = choice.partition("=")[0]
    config = compose("train", choice, "data.root=somewhere")
    values = group(config, name)
    if name == "model":
        values["language"].pop("tokenizer")
        build_settings(ModelSettings, values, "model")
    elif name == "trainer":
        training_arguments(values | {"use_cpu": True}, tmp_path, 0)
    else:
        build_settings(CHECKED[name], values, name)


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
        ("trainer.learning_rte=1", "did you mean 'trainer.learning_rate'"),
        ("data.rooot=x", "did you mean 'data.root'"),
        ("model=tinny", "did you mean 'tiny'"),
        ("modle=tiny", "did you mean 'model'"),
        ("+trainer.foo=1", "no key 'trainer.foo'"),
        ("run.dri=x", "did you mean 'run.dir'"),
        ("sede=1", "did you mean 'seed'"),
    ],
)
def test_misspelt_overrides_suggest(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_overrides([override], "train")


def test_any_training_argument_may_be_given() -> None:
    assert check_overrides(["trainer.adam_beta2=0.95", "seed=1"], "train") == ["++trainer.adam_beta2=0.95", "seed=1"]
    assert check_overrides(["model.vision.overrides.reg_tokens=4"], "train")[0].startswith("++model")


def test_slices_need_no_quotes() -> None:
    given = check_overrides(["data.train_split=train[:10%]", "data.root=/a b/c"], "train")
    config = compose("train", *given)
    assert config.data.train_split == "train[:10%]" and config.data.root == "/a b/c"


def test_repeated_questions_become_a_list() -> None:
    given = ["question=What's it, a 'cat'?", "checkpoint=x", "question=how many\\few?"]
    kept = collect(given, ["question", "image"])
    assert kept[0] == "checkpoint=x"
    config = compose("predict", *kept)
    assert OmegaConf.to_container(config.question) == ["What's it, a 'cat'?", "how many\\few?"]
