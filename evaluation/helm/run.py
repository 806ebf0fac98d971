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
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import chdir, redirect_stdout
from datetime import date
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

sys.path.append(str(Path(__file__).resolve().parents[2] / "launch"))  # the same command line as the scripts there

from command_line import run
from evaluation.helm import checks, results
from evaluation.helm.plan import Plan, make_plan
from vlmvqa import __version__, fingerprint
from vlmvqa.data.example import Example
from vlmvqa.data.submissions import replace_file
from vlmvqa.errors import InputError

SCHEMA = Path(__file__).parent / "schema_vqav2_bleu.yaml"
PACKAGES = ("crfm-helm", "nltk", "rouge_score", "torch", "transformers", "timm", "tokenizers", "pillow")


def main(config: DictConfig) -> None:
    checks.refuse_missing_helm()
    plan = make_plan(config)
    if (plan.folder / "summary.json").exists() and not config.run.overwrite:
        raise InputError(f"{plan.folder} already holds results; choose another name=... or set run.overwrite=true")
    checks.use_punkt(config.punkt, plan.home)
    checks.refuse_bad_pictures(plan.examples)
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
