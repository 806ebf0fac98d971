"""HELM's score of a model, from one command; offline, once the data is there.

python -m evaluation.helm.run checkpoint=runs/vqa data.root=/data/vqav2 controls=true
python -m evaluation.helm.run checkpoint=runs/vqa data=gqa data.root=/data/gqa max_instances=500
python -m evaluation.helm.run predictions=runs/eval-vqav2/predictions.jsonl data.root=/data/vqav2

What can be wrong is looked for before the model is loaded. A run that was killed goes on with the same command: HELM
keeps the answers that it has.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import isnan
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2] / "launch"))  # the same command line as the scripts there

from command_line import group, refuse_overrides, run
from data_from_config import DataSettings, one_task, read_examples
from evaluation.helm import results
from vlmvqa import __version__, fingerprint
from vlmvqa.data import images
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, all_answered
from vlmvqa.data.submissions import replace_file
from vlmvqa.errors import InputError
from vlmvqa.models import saved

ENTRIES = ("vqav2", "gqa")  # run_specs.py has a run entry for each
SCHEMA = Path(__file__).parent / "schema_vqav2_bleu.yaml"
PUNKT = "tokenizers/punkt_tab/english"
PUNKT_FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")
NOT_HERE = {
    "max_instances that says how many": ("data.max_eval_samples", "data.max_train_samples"),
    "HELM that draws, from the validation questions": ("data.eval_split", "data.train_split"),
    "prompt=... that is used": ("data.prompt",),
    "the official files in data.root that HELM's questions are read from": (
        "data.hub",
        "data.packed",
        "data.streaming",
    ),
    "HELM's own": ("decoding.max_new_tokens", "decoding.temperature", "decoding.seed"),
}
PACKAGES = ("crfm-helm", "nltk", "rouge_score", "torch", "transformers", "timm", "tokenizers", "pillow")


@dataclass(frozen=True)
class Plan:
    """What HELM is going to be asked for, all of it checked.

    Attributes:
        home: HELM's files of all models: prod_env/ (what can be run, the cache), benchmark_output/.
        model: its name in HELM's tables.
        client: what answers: a model with arguments of `VLMClient`, or a file of predictions.
        source: whose questions.
        scenario: arguments of the run entry, but for the image mode.
        threads: of HELM.
        examples: the questions.
    """

    home: Path
    model: str
    client: Mapping[str, Any]
    source: str
    scenario: Mapping[str, Any]
    modes: Sequence[str]
    threads: int
    examples: Sequence[Example]

    @property
    def suite(self) -> str:
        """Of the runs that may stand in one table: about the same questions."""
        return f"{self.source}-{self.scenario['max_instances']}"

    @property
    def folder(self) -> Path:
        """Of what we leave."""
        return self.home / f"{self.model.rpartition('/')[2]}-{self.suite}"


def main(config: DictConfig) -> None:
    _refuse_missing_helm()
    plan = make_plan(config)
    if (plan.folder / "summary.json").exists() and not config.run.overwrite:
        raise InputError(f"{plan.folder} already holds results; choose another name=... or set run.overwrite=true")
    use_punkt(config.punkt, plan.home)
    _refuse_bad_pictures(plan.examples)
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    describe_model(plan)
    asked = f"{len(plan.modes)} x " if len(plan.modes) > 1 else ""
    log = plan.folder / "helm.log"
    print(f"HELM asks {asked}{plan.scenario['max_instances']:,} questions; what it says is in {log}", flush=True)
    run_helm(plan, log)
    found = summarize(plan, config)
    replace_file(plan.folder / "summary.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(results.table(found))
    print(f"all of it: {plan.folder / 'summary.json'}")
    print(f"HELM's pages: {found['pages']}, then http://localhost:8000")


# --- before inference -----------------------------------------------------------------------------------


def make_plan(config: DictConfig) -> Plan:
    """What the command asks for.

    Raises:
        InputError: it cannot be had.
    """
    given = [name for name in ("checkpoint", "predictions") if config[name] is not None]
    if len(given) != 1:
        said = "both are given" if given else "neither is given"
        raise InputError(f"say what to score: checkpoint=... (a model) or predictions=... (its answers); {said}")
    if config.data.source not in ENTRIES:
        raise InputError(f"data={config.data.source}: HELM asks {' or '.join(ENTRIES)} here; choose one of them")
    for reason, keys in NOT_HERE.items():
        refuse_overrides(reason, *keys)
    if given == ["predictions"]:
        refuse_overrides("the model's, and none is loaded", "prompt", *(f"decoding.{key}" for key in config.decoding))
        if config.controls:
            raise InputError("controls=true asks the model about other images; give checkpoint=... for it")
        path = Path(config.predictions).expanduser().resolve()
        if not path.is_file():
            raise InputError(f"predictions={path} does not exist; correct the path")
        client: dict[str, Any] = {"predictions": str(path)}
        name = path.parent.name
    else:
        folder = saved.find(config.checkpoint).resolve()
        if not (folder / saved.WEIGHTS).is_file():
            raise InputError(f"{folder} holds no {saved.WEIGHTS}; copy or save the model again")
        client = {"checkpoint": str(folder), "prompt": config.prompt, "source": config.data.source}
        client |= {"batch_size": config.batch_size, "decoding": _given_decoding(config)}
        name = (folder.parent if folder.name == "model" else folder).name
    data = one_task(config)
    scenario = {"root": str(Path(str(data.root)).expanduser().resolve())}
    if "," in scenario["root"]:
        raise InputError(
            f"data.root={data.root} holds a comma, which HELM's run entries cannot; move or link the folder"
        )
    return Plan(
        Path(group(config, "run")["dir"]).expanduser(),
        "vlmvqa/" + re.sub(r"[^\w.-]+", "-", str(config.name or name)),
        client,
        data.source,
        {**scenario, "max_instances": config.max_instances, "seed": config.seed},
        ("real", "blank", "shuffled") if config.controls else ("real",),
        config.batch_size,
        _draw(data, config.max_instances),
    )


def _draw(data: DataSettings, max_instances: int) -> list[Example]:
    """The questions that HELM is going to draw."""
    examples = read_examples(data, f"val[random:{max_instances}]", None, BadRecords(advice=""))
    if not all_answered(examples):
        raise InputError(f"{data.root}: some of the questions have no answers to score against")
    return examples


def _given_decoding(config: DictConfig) -> dict[str, Any]:
    """What the command line says of it; the rest is the model's own."""
    given = [override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task]
    return {key: value for key, value in group(config, "decoding").items() if f"decoding.{key}" in given}


def _refuse_missing_helm() -> None:
    try:
        version("crfm-helm")
    except PackageNotFoundError:
        raise InputError("crfm-helm is not installed; install it with: pip install 'vlmvqa[helm]'") from None


def use_punkt(punkt: str, home: Path) -> None:
    """Make sure that HELM can cut answers into words: it fails without nltk's model, and after all inference.

    Raises:
        InputError: nltk's sentence model is not there.
    """
    if punkt not in ("nltk", "stand_in"):
        raise InputError(f"punkt={punkt} is unknown; use nltk or stand_in")
    import nltk

    if punkt == "stand_in":
        for name in PUNKT_FILES:
            replace_file(home / "nltk_data" / PUNKT / name, "")
        nltk.data.path.insert(0, str((home / "nltk_data").resolve()))
    try:
        nltk.data.find(f"{PUNKT}/")
    except LookupError:
        raise InputError(
            "nltk's punkt_tab, which HELM cuts answers into words with, is not installed; fetch it once with: "
            "python -m nltk.downloader punkt_tab; or, without a network, add punkt=stand_in, which differs only for "
            "answers with a full stop inside (abbreviations count as ends of sentences)"
        ) from None


def _refuse_bad_pictures(examples: Sequence[Example]) -> None:
    """Stop at a picture that is missing or damaged: HELM would, after half an hour of answers."""

    def look(example: Example) -> None:
        images.decode(example.image, example.name)

    with ThreadPoolExecutor() as threads:
        found = threads.map(look, examples)
        for _ in tqdm(found, desc="looking at the images", total=len(examples), leave=False, disable=None):
            pass


# --- HELM -----------------------------------------------------------------------------------------------


def describe_model(plan: Plan) -> None:
    """Tell HELM of the model, among those that are in its files already."""
    client = plan.client
    if "predictions" in client:
        answers = plan.folder / "answers.json"
        replace_file(answers, json.dumps(_saved_answers(plan, Path(client["predictions"])), ensure_ascii=False))
        spec = {"class_name": "evaluation.helm.client.SavedAnswersClient", "args": {"answers": str(answers.resolve())}}
    else:
        spec = {"class_name": "evaluation.helm.client.VLMClient", "args": dict(client)}
    name = plan.model.rpartition("/")[2]
    # No tokenizer and no lengths: HELM would fetch the one, and cut prompts to the other.
    deployment = {"name": plan.model, "model_name": plan.model, "client_spec": spec}
    metadata = {
        "name": plan.model,
        "creator_organization_name": "vlmvqa",
        "display_name": name,
        "description": client.get("checkpoint") or client["predictions"],
        "access": "limited",
        "release_date": date.today(),
        "tags": ["VISION_LANGUAGE_MODEL_TAG", "LIMITED_FUNCTIONALITY_VLM_TAG"],
    }
    for file, key, record in (
        ("model_deployments.yaml", "model_deployments", deployment),
        ("model_metadata.yaml", "models", metadata),
    ):
        path = plan.home / "prod_env" / file
        known = yaml.safe_load(path.read_text(encoding="utf-8"))[key] if path.exists() else []
        others = [one for one in known if one["name"] != plan.model]
        replace_file(path, yaml.safe_dump({key: [*others, record]}, sort_keys=False, allow_unicode=True))


def _saved_answers(plan: Plan, path: Path) -> list[dict[str, Any]]:
    """The answers to HELM's questions, by what HELM's requests hold: the image's file and the question's text."""
    from vlmvqa.inference.evaluate import read_answers  # with PyTorch and transformers

    asked = [(example, question) for example in plan.examples for question in example.questions]
    answers = read_answers(path, [question for _, question in asked], others=True)
    records = [
        {
            "image": str(_file(example)),
            "question": question.text,
            "text": answers[question.id].text,
            "log_probability": None if isnan(known := answers[question.id].log_probability) else known,
        }
        for example, question in asked
    ]
    found: dict[tuple[str, str], str] = {}
    for example, question in asked:
        text = answers[question.id].text
        if found.setdefault((str(_file(example)), question.text.strip()), text) != text:
            raise InputError(
                f"{path}, question {question.id}: the same question about the same image has two answers, which HELM "
                "cannot tell apart; score the checkpoint"
            )
    return records


def _file(example: Example) -> Path:
    assert isinstance(example.image, Path)
    return example.image.resolve()


def run_helm(plan: Plan, log: Path) -> None:
    """helm-run and helm-summarize.

    Raises:
        InputError: what made HELM stop.
    """
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.append(root)
    arguments = {**plan.scenario, "model": plan.model}
    entries = [
        f"vlmvqa_{plan.source}:"
        + ",".join(f"{key}={value}" for key, value in {**arguments, "image_mode": mode}.items())
        for mode in plan.modes
    ]
    # From the folder itself, as HELM's pages find pictures by paths that begin with benchmark_output/.
    both = {"--local-path": "prod_env", "--output-path": "benchmark_output", "--suite": plan.suite}
    running = {
        **both,
        "--max-eval-instances": plan.scenario["max_instances"],
        "--num-threads": plan.threads,
        "--plugins": "evaluation.helm.run_specs",
        "--runner-class-name": "evaluation.helm.runner.AnsweringRunner",
    }
    # nltk warns of every answer under four words, which has no BLEU-4.
    warnings.filterwarnings("ignore", module="nltk.translate.bleu_score")
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), chdir(plan.home):
        try:
            _command("helm.benchmark.run", running, "--exit-on-error", "--run-entries", *entries)
            _command("helm.benchmark.presentation.summarize", {**both, "--schema-path": SCHEMA})
        except Exception as error:
            traceback.print_exc(file=file)
            sentence = str(error).partition(" Request: Request(")[0].strip().splitlines()[0]
            raise InputError(f"HELM stopped: {sentence.rstrip('.')}; all it said is in {log}") from error


def _command(module: str, options: Mapping[str, Any], *more: str) -> None:
    """Run a command of HELM's as its console script does, but in this process, which then has the model."""
    ours, sys.argv = sys.argv, [module, *(str(word) for option in options.items() for word in option), *more]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = ours


def summarize(plan: Plan, config: DictConfig) -> dict[str, Any]:
    """`summary.json`'s content."""
    output = plan.home / "benchmark_output"
    scored, folder = {}, output
    for mode in plan.modes:
        folder = results.find(output / "runs" / plan.suite, plan.model, {**plan.scenario, "image_mode": mode})
        scored[mode] = results.read(folder)
        results.refuse_other(scored[mode], plan.examples, folder)
    if "checkpoint" in plan.client:
        from evaluation.helm.client import used  # it has the model

        by = used(**plan.client)
    else:
        by = dict(plan.client)
    return {
        "model": plan.model,
        **by,
        "helm_asked": results.adapter(folder),
        "data": plan.source,
        "split": f"val[random:{plan.scenario['max_instances']}]",
        "data_fingerprint": fingerprint.examples(plan.examples),
        "punkt": config.punkt,
        **results.summary(scored, plan.examples, config.seed),
        "versions": {"vlmvqa": __version__, **{package: version(package) for package in PACKAGES}},
        "pages": f"cd {plan.home} && helm-server --suite {plan.suite}",
    }


if __name__ == "__main__":
    run(main, "helm")
