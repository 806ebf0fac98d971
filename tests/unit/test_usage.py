"""What a script says of itself without PyTorch: -h and its keys, completion, --cfg job; and `vlmvqa` beside them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from tests.conftest import ROOT
from tests.end_to_end.scripts import call
from vlmvqa.__main__ import commands, scripts
from vlmvqa.config.early_checks import HYDRA_OPTIONS, refuse_flags
from vlmvqa.config.help import PAGES, page
from vlmvqa.config.overrides import compose
from vlmvqa.config.suggestions import ALIASES, default_keys
from vlmvqa.errors import InputError
from vlmvqa.paths import HELM_MODULE

SCRIPTS = scripts()
PYTHON = [sys.executable]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which PyTorch and transformers cannot be imported."""
    folder = tmp_path_factory.mktemp("heavy")
    for name in ("torch", "transformers", "timm"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")])}


def ask(environment: dict[str, str], *command: str, **more: str) -> str:
    """What a command prints, with no complaint."""
    ended = subprocess.run(
        [*PYTHON, *command], env=environment | more, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_two_screens_at_most_and_needs_no_pytorch(name: str, light: dict[str, str]) -> None:
    command = ["-m", HELM_MODULE] if name == "helm" else [str(SCRIPTS[name])]
    said = ask(light, *command, "-h")
    lines = said.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert sum(bool(re.match(r"(python|accelerate|deepspeed|vlmvqa) ", line)) for line in lines) >= 2  # examples
    others = {
        "merge": "ties",
        "verify": "dinov2_gemma2_2b",
        "study": "learning_rate",
        "sweep": "learning_rate",
        "export": "",
    }
    choices = others.get(name, r"decoding +greedy")
    for part in ("Groups, as group=choice:", "--cfg job", choices):
        assert re.search(part, said)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_key_of_a_page_is_one_that_hydra_knows(name: str) -> None:
    """With the value that stands there, but for those that are left to the reader."""
    script = name.split()[0]
    written = re.findall(r"(?<!\S)([a-z_]+(?:\.[a-z_]+)*)=(\"[^\"]*\"|\S+)", PAGES[name])
    skipped = {"key"}  # key=value
    first = []
    if script == "prepare":  # commands of other scripts on the same page
        skipped |= {"trainable.vision", "data.feature_cache", "data.shards"}
        first = [name.partition(" ")[2] or "check"]
    given = {key: value.strip('"') for key, value in written if value != "..." and key not in skipped}
    needed = {"data": "shapes"} if script in ("eval", "merge") else {}
    arguments = [f"{key}={value}" for key, value in {**needed, **given}.items()]
    assert given
    compose([*first, *arguments], script)


@pytest.mark.parametrize("name", SCRIPTS)
def test_cfg_job_prints_the_whole_config(name: str) -> None:
    ended = call(name, "--cfg", "job")
    assert ended.status == 0
    said = ended.out
    assert "\nrun:\n" in said and said.count("\n") >= 5  # export has the fewest keys


def test_cfg_job_needs_no_pytorch(light: dict[str, str]) -> None:
    assert "learning_rate: 0.5" in ask(light, "launch/train.py", "trainer.learning_rate=0.5", "--cfg", "job")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate 1e-4: settings are given as key=value, without dashes; write "),
        (["--learning_rate", "1e-4"], "; write trainer.learning_rate=1e-4"),
        (["--learning-rate=1e-4"], "; write trainer.learning_rate=1e-4"),
        (["--trainer.learning_rate", "1e-4"], "; write trainer.learning_rate=1e-4"),
        (["--lerning_rate", "1e-4", "seed=1"], "; write trainer.learning_rate=1e-4"),
        (["-lr", "1e-4"], "; write trainer.learning_rate=1e-4"),
        (["--batch-size", "8"], "; write trainer.per_device_train_batch_size=8"),
        (["--max_steps", "-1"], "; write trainer.max_steps=-1"),
        (["--bf16", "--seed", "1"], "--bf16: settings are given as key=value, without dashes; write trainer.bf16=true"),
        (["--seed", "1"], "; write seed=1"),
        (["--output_dir", "out"], "; write run.dir=out"),
        (["--data.prompt", "what is it?"], "; write 'data.prompt=what is it?'"),
        (["--config", "file.yaml"], "--config file.yaml: settings are given as key=value"),
        (["model=pretrained", "--model_name_or_path", "x/y"], "; write model.pretrained=x/y"),
    ],
)
def test_a_flag_is_answered_with_the_setting(given: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        refuse_flags(given, "train")
    assert said in str(error.value)


def test_options_of_hydra_and_of_launchers_are_no_settings() -> None:
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert known == set(HYDRA_OPTIONS)
    refuse_flags([*HYDRA_OPTIONS, "--local_rank=0", "--multi", "--cfg=job", "seed=-1", "~logger"], "train")


def test_every_alias_is_of_a_key() -> None:
    keys = {name for script in (*SCRIPTS, "helm") for name in default_keys(script, ["adapt=lora", "model=pretrained"])}
    keys |= default_keys("train")
    assert {name.partition("=")[0] for name in ALIASES} <= keys


def test_a_shell_completes_keys_and_choices_without_pytorch(light: dict[str, str]) -> None:
    script = "launch/train.py"
    assert "hydra_bash_completion python" in ask(light, script, "-sc", "install=bash")
    line = f"python {script} data=gqa trainer.learn"
    assert ask(light, script, "-sc", "query=bash", COMP_LINE=line).split() == ["trainer.learning_rate="]
    found = ask(light, "launch/prepare.py", "-sc", "query=bash", COMP_LINE="python launch/prepare.py pack model=tiny_")
    assert found.split() == ["model=tiny_idefics2", "model=tiny_paligemma"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "modle=tiny"], "there is no key 'modle'; did you mean 'model=tiny'?"),
        (["train", "-m", "trainer.lerning_rate=1,2"], "did you mean 'trainer.learning_rate=1,2'?"),
        (["eval", "checkpoint=no/such/run", "data=shapes"], "no model at "),
        (["prepare", "check", "data=jsnl"], "data=jsnl: there is no conf/data/jsnl.yaml; did you mean 'jsonl'?"),
    ],
)
def test_a_mistake_is_said_before_pytorch_is_imported(command: list[str], said: str) -> None:
    script, *given = command
    ended = subprocess.run(
        [*PYTHON, "-X", "importtime", str(SCRIPTS[script]), *given],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: ") and said in ended.stderr
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if "import time" in line}
    assert "hydra" in imported and not imported & {"torch", "transformers"}


def test_bash_completes_the_installed_command(light: dict[str, str], tmp_path: Path) -> None:
    """In a real bash, by the function that it calls at TAB."""
    command = tmp_path / "vlmvqa"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vlmvqa "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(vlmvqa -sc install=bash)"
        complete_line() {
            COMP_LINE="$1"; COMP_POINT=${#1}; COMP_CWORD=$2; hydra_bash_completion; echo "${COMPREPLY[@]}"
        }
        complete_line "vlmvqa tr" 1
        complete_line "vlmvqa train model=tiny_" 2
        complete -p vlmvqa
    """
    environment = light | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    first, second, third = ended.stdout.splitlines()
    assert (first, second) == ("train", "model=tiny_idefics2 model=tiny_paligemma")
    assert third.endswith("-F hydra_bash_completion vlmvqa")


def test_vlmvqa_lists_its_commands_and_starts_them(light: dict[str, str]) -> None:
    listed = ask(light, "-m", "vlmvqa")
    assert listed == ask(light, "-m", "vlmvqa", "-h")
    for name, about in commands().items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", listed, re.MULTILINE)
    assert "\nvlmvqa helm checkpoint=" in ask(light, "-m", "vlmvqa", "helm", "-h")
    shown = ask(light, "-m", "vlmvqa", "train", "-h")
    assert shown == ask(light, "-m", "vlmvqa", "--local_rank=0", "train", "-h")  # as `deepspeed --module` starts it
    assert "launch/train.py" not in shown
    assert "deepspeed --module vlmvqa train" in shown
    ends = {len(line) - len(re.split(r" {3,}", line)[-1]) for line in shown.splitlines()[2:7] if "   " in line}
    assert len(ends) == 1  # what stands beside the commands stands in a column


def test_a_command_that_is_none_gets_the_nearest(light: dict[str, str]) -> None:
    ended = subprocess.run([*PYTHON, "-m", "vlmvqa", "trian"], env=light, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: vlmvqa has no command 'trian'; run vlmvqa -h for a list; did you mean 'train'?\n"


def test_the_page_names_its_script() -> None:
    assert "python launch/show.py --cfg job" in page("show", SCRIPTS["show"])
