"""Model card: description, scores with their controls, licences and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.metrics.registry import metric
from vlmvqa.models.checkpoint import OURS, read_config
from vlmvqa.paths import is_hub_id

# Licences by a substring of the model's name: the hub's identifier, and the text for the card.
LICENCES = {
    "idefics2": ("apache-2.0", "Apache-2.0"),
    "gemma": ("gemma", "[Gemma terms of use](https://ai.google.dev/gemma/terms)"),
    "dinov2": ("apache-2.0", "Apache-2.0"),
}
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def licences(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the model's licence as a hub identifier ("other" if unknown), and a sentence for each part's weights."""
    identifiers, sentences = [], []
    model = config["model"]
    parts = {"pretrained": {"name": model["pretrained"], **model}} if "pretrained" in model else model
    for part in [part for part in ("pretrained", "vision", "language") if part in parts]:
        settings = parts[part]
        name, weights = str(settings["name"]), str(settings["weights"])
        if weights == "random":
            identifier, terms = "apache-2.0", "randomly initialised and trained here, Apache-2.0"
        else:
            known = [licence for family, licence in LICENCES.items() if family in name.lower() and weights == "hub"]
            source = _without_paths(name if weights == "hub" else weights)
            identifier, terms = known[0] if known else ("other", f"the terms of {source}")
        identifiers.append(identifier)
        sentences.append(f"The {part} model's weights, {_without_paths(name)}: {terms}")
    strict = [identifier for identifier in identifiers if identifier != "apache-2.0"]
    return ("other" if "other" in strict or len(set(strict)) > 1 else (strict or ["apache-2.0"])[0]), sentences


def write_card(folder: Path, name: str, metrics: Sequence[Mapping[str, Any]], config_yaml: str) -> None:
    """Write the model card `README.md` next to the weights, without absolute paths.

    Args:
        folder: the folder of a saved model.
        name: hub id or folder that users will load the model by.
        metrics: content of `metrics.json` of each task.
        config_yaml: the resolved config of the run.
    """
    config, saved = yaml.safe_load(config_yaml), read_config(folder)
    base = _base(saved)
    licence, terms = licences(config)
    terms.append(f"The data's terms: those of the publisher of {', '.join(one['data'] for one in metrics)}")
    (folder / "README.md").write_text(
        f"""---
library_name: {"peft" if "adapter" in saved and is_hub_id(base) else "vlmvqa"}
pipeline_tag: visual-question-answering
license: {licence}
{f"base_model: {base}{chr(10)}" if is_hub_id(base) else ""}---

# {Path(name).expanduser().resolve().name}

{_description(saved, base)}

```python
import vlmvqa

print(vlmvqa.load("{name}").answer("photo.jpg", "what is this?").text)
```

## Scores

| task | metric | questions | model | majority baseline | shuffled images |
|---|---|---|---|---|---|
{"".join(_row(one) for one in metrics)}
- Majority baseline: the most frequent training answer of each question type.
- Shuffled images: the same questions, each with another question's image.
{"".join(_measured(one) for one in metrics)}
## Licences

{"".join(f"- {sentence}." + chr(10) for sentence in terms)}
## Configuration

```yaml
{yaml.safe_dump(_without_paths(config), sort_keys=False, allow_unicode=True).strip()}
```
""",
        encoding="utf-8",
    )


def _description(saved: Mapping[str, Any], base: str) -> str:
    """Return a sentence about the kind of model and how it was trained."""
    if base.startswith("."):
        base_name = "the model in `base/`"
    elif is_hub_id(base):
        base_name = f"[{base}](https://huggingface.co/{base})"
    else:
        base_name = f"a local model (`{_without_paths(base)}`)"
    if "adapter" in saved:
        settings = saved["adapter"]["settings"]
        bits = f", over a base in {settings['bits']} bits" if settings["bits"] else ""
        kind = f"{METHODS[settings['method']]}, rank {settings['rank']}{bits}"
        return f"Adapters ({kind}) of {base_name}, which answer questions about images."
    if OURS in saved:
        origin = f"fine-tuned from {base_name}" if base else "trained from random weights"
        return f"`{saved['architectures'][0]}` of transformers, {origin} to answer questions about images."
    return "A vision encoder, a projector and a language model that answer questions about images."


def _base(saved: Mapping[str, Any]) -> str:
    """Return the base of the adapters, or the model that training started from: a hub id, a folder, or ""."""
    if "adapter" in saved:
        return str(saved["adapter"]["base"])
    return str((saved.get(OURS, saved).get("started_from") or {"model": ""})["model"])


def _without_paths(value: Any) -> Any:
    """Replace each absolute path in a setting with its last component, and `<run>/model` with the run's name."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path = Path(value)
    return path.parent.name if path.name == "model" else path.name


def _row(metrics: Mapping[str, Any]) -> str:
    """Return a task's row of the score table."""
    columns = [
        metrics["metrics"][metrics["metric"]],
        *(metrics["controls"][name] for name in ("prior", "shuffled_images")),
    ]
    values = ["-" if column["overall"] is None else f"{column['overall']:.2f}" for column in columns]
    about = [f"{metrics['data']} {metrics['split']}", metric(metrics["metric"]).title, str(metrics["n"])]
    return f"| {' | '.join(about + values)} |\n"


def _measured(metrics: Mapping[str, Any]) -> str:
    return f"- Metric and prompt of {metrics['data']}: {metrics['metric_version']}; `{metrics['prompt']!r}`.\n"
