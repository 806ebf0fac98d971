"""Score a model with HELM; needs no network once the data is downloaded.

vlmvqa helm checkpoint=runs/vqa data.root=/data/vqav2 controls=true
vlmvqa helm checkpoint=runs/vqa data=gqa data.root=/data/gqa max_instances=500
vlmvqa helm predictions=runs/eval-vqav2/predictions.jsonl data.root=/data/vqav2

All settings are checked before the model is loaded. The same command resumes a run that was killed: HELM caches the
answers.
"""

from __future__ import annotations

from vlmvqa import cli

with cli.script(__name__, __file__):
    import importlib
    import json
    import logging
    import shlex
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
    from filelock import FileLock, Timeout

    from vlmvqa import __version__, fingerprint
    from vlmvqa.config.compose import to_yaml
    from vlmvqa.data.example import Example
    from vlmvqa.errors import InputError
    from vlmvqa.evaluation.helm import checks, results
    from vlmvqa.evaluation.helm.plan import HelmConfig, Plan, make_plan
    from vlmvqa.paths import replace_file

SCHEMA = Path(__file__).parent / "schema_vqav2_bleu.yaml"
CLIENTS = "vlmvqa.evaluation.helm.client"  # HELM imports them by name
PACKAGES = ("crfm-helm", "nltk", "rouge_score", "torch", "transformers", "timm", "tokenizers", "pillow")


def main(config: HelmConfig) -> None:
    """Score a model, or a file of answers, with HELM."""
    checks.refuse_missing_helm()
    plan = make_plan(config)
    if (plan.folder / "summary.json").exists() and not config.run.overwrite:
        raise InputError(f"{plan.folder} already holds results; choose another name=... or set run.overwrite=true")
    try:
        plan.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir={plan.home} cannot be created ({error.strerror}); choose another") from error
    try:
        with FileLock(plan.home / ".lock", timeout=0):
            checks.use_punkt(config.punkt, plan.home)
            checks.refuse_bad_images(plan.examples)
            score(plan, config)
    except Timeout:
        raise InputError(f"another command is running in {plan.home}; wait for it, or choose another run.dir") from None


def score(plan: Plan, config: HelmConfig) -> None:
    """Run HELM and write `summary.json` as the last file."""
    answers = None  # read or load first: an error must not overwrite anything
    if plan.predictions is not None:
        answers = _saved_answers(plan, plan.predictions)
    else:
        from vlmvqa.evaluation.helm.model import load  # imports PyTorch and transformers

        load(**plan.client)
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "summary.json").unlink(missing_ok=True)  # older results are overwritten
    results.remove(plan.home / "benchmark_output" / "runs" / plan.suite, plan.model)
    (plan.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    describe_model(plan, answers)
    asked = f"{len(plan.modes)} x " if len(plan.modes) > 1 else ""
    log = plan.folder / "helm.log"
    print(f"HELM asks {asked}{plan.scenario['max_instances']:,} questions; its output is in {log}", flush=True)
    run_helm(plan, log)
    found = summarize(plan, config)
    replace_file(plan.folder / "summary.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(results.table(found))
    print(f"summary: {plan.folder / 'summary.json'}")
    print(f"HELM's pages: {found['pages']}, then http://localhost:8000")


def describe_model(plan: Plan, answers: list[dict[str, Any]] | None) -> None:
    """Add the model, or its answers, to HELM's files of models."""
    if answers is not None:
        path = plan.folder / "answers.json"
        replace_file(path, json.dumps(answers, ensure_ascii=False))
        spec = {"class_name": f"{CLIENTS}.SavedAnswersClient", "args": {"answers": str(path.resolve())}}
    else:
        spec = {"class_name": f"{CLIENTS}.VLMClient", "args": dict(plan.client)}
    # No tokenizer and no lengths: HELM would download the tokenizer and truncate prompts to the lengths.
    deployment = {"name": plan.model, "model_name": plan.model, "client_spec": spec}
    metadata = {
        "name": plan.model,
        "creator_organization_name": "vlmvqa",
        "display_name": plan.model.rpartition("/")[2],
        "description": plan.client.get("checkpoint") or str(plan.predictions),
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
    """Return the answers with what HELM's requests identify them by: the image's file and the question's text."""
    from vlmvqa.inference.answer_file import read_answers  # imports PyTorch and transformers

    asked = [(example, question) for example in plan.examples for question in example.questions]
    answers = read_answers(path, [question for _, question in asked], others=True)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for example, question in asked:
        key, answer = (str(_file(example)), question.text), answers[question.id]
        known = None if isnan(answer.log_probability) else answer.log_probability
        record = {"image": key[0], "question": key[1], "text": answer.text, "log_probability": known}
        if found.setdefault(key, record)["text"] != answer.text:
            raise InputError(
                f"{path}, question {question.id}: the same question about the same image has two answers, which HELM "
                "cannot distinguish; score the checkpoint"
            )
    return list(found.values())


def _file(example: Example) -> Path:
    assert isinstance(example.image, Path)
    return example.image.resolve()


def run_helm(plan: Plan, log: Path) -> None:
    """Run helm-run and helm-summarize.

    Raises:
        InputError: HELM failed; with its error.
    """
    arguments = {**plan.scenario, "model": plan.model}
    entries = [
        f"vlmvqa_{plan.source}:"
        + ",".join(f"{key}={value}" for key, value in {**arguments, "image_mode": mode}.items())
        for mode in plan.modes
    ]
    # Runs in the folder itself, because HELM's pages find images by paths that begin with benchmark_output/.
    both = {"--local-path": "prod_env", "--output-path": "benchmark_output", "--suite": plan.suite}
    running = {
        **both,
        "--max-eval-instances": plan.scenario["max_instances"],
        "--num-threads": plan.threads,
        "--plugins": "vlmvqa.evaluation.helm.run_specs",
        "--runner-class-name": "vlmvqa.evaluation.helm.runner.AnsweringRunner",
    }
    schema = plan.home / f"schema_{plan.source}.yaml"
    replace_file(schema, yaml.safe_dump(_groups_of(plan.source), sort_keys=False, allow_unicode=True))
    # nltk warns about every answer under four words, which has no BLEU-4.
    warnings.filterwarnings("ignore", module="nltk.translate.bleu_score")
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), chdir(plan.home):
        try:
            _command("helm.benchmark.run", running, "--exit-on-error", "--run-entries", *entries)
            _command("helm.benchmark.presentation.summarize", {**both, "--schema-path": schema.name})
        except Exception as error:
            traceback.print_exc(file=file)
            said = str(error).partition(" Request: Request(")[0].strip() or type(error).__name__
            raise InputError(f"HELM stopped: {said.splitlines()[0].rstrip('.')}; its output is in {log}") from error


def _groups_of(source: str) -> dict[str, Any]:
    """Return the schema with one dataset's groups: HELM's pages open the first group even if it has no runs."""
    schema: dict[str, Any] = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    prefix = source.removesuffix("v2")
    return {**schema, "run_groups": [one for one in schema["run_groups"] if one["name"].startswith(prefix)]}


def _command(module: str, options: Mapping[str, Any], *more: str) -> None:
    """Run one of HELM's console scripts in this process, so that the model stays loaded."""
    logging.getLogger("helm").handlers.clear()  # each command adds its own
    ours, sys.argv = sys.argv, [module, *(str(word) for option in options.items() for word in option), *more]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = ours


def summarize(plan: Plan, config: HelmConfig) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    suite = plan.home / "benchmark_output" / "runs" / plan.suite
    folders = {mode: results.find(suite, plan.model, {**plan.scenario, "image_mode": mode}) for mode in plan.modes}
    scored = {mode: results.read(folder) for mode, folder in folders.items()}
    for mode, folder in folders.items():
        results.check_scores(scored[mode], plan.examples, folder)
    limits = results.adapter(folders["real"])
    if plan.predictions is None:
        from vlmvqa.evaluation.helm.client import effective_settings  # the model is loaded

        by = effective_settings(limits, **plan.client)
    else:
        digest = fingerprint.file(plan.predictions)
        by = {"predictions": str(plan.predictions), "predictions_fingerprint": digest, "decoding": "unknown"}
    return {
        "model": plan.model,
        **by,
        "helm_asked": limits,
        "data": plan.source,
        "root": plan.scenario["root"],
        "split": f"val[random:{plan.scenario['max_instances']}]",
        "data_fingerprint": fingerprint.examples(plan.examples),
        "punkt": config.punkt,
        **results.summary(scored, plan.examples, config.seed),
        "versions": {"vlmvqa": __version__, **{package: version(package) for package in PACKAGES}},
        "suite": plan.suite,
        "pages": f"cd {shlex.quote(str(plan.home))} && helm-server --suite {plan.suite}",
    }


if __name__ == "__main__":
    cli.run("helm", HelmConfig, main)
