"""The model card: what was trained on what, how it scored beside its controls, and whose licences apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.metrics.registry import metric
from vlmvqa.models.checkpoint import OURS, read_config
from vlmvqa.paths import is_hub_id

# Weights that are known by their names, and under which terms they are given: the hub's word, and a sentence.
LICENCES = {
    "idefics2": ("apache-2.0", "Apache-2.0"),
    "gemma": ("gemma", "[Gemma terms of use](https://ai.google.dev/gemma/terms)"),
    "dinov2": ("apache-2.0", "Apache-2.0"),
}
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def licences(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The hub's word for the licence of all, and a sentence for each part's weights; what is not known is "other"."""
    words, sentences = [], []
    model = config["model"]
    parts = {"pretrained": {"name": model["pretrained"], **model}} if "pretrained" in model else model
    for part in [part for part in ("pretrained", "vision", "language") if part in parts]:
        settings = parts[part]
        name, weights = str(settings["name"]), str(settings["weights"])
        if weights == "random":
            word, terms = "apache-2.0", "drawn at random and trained here, Apache-2.0"
        else:
            known = [licence for mark, licence in LICENCES.items() if mark in name.lower() and weights == "hub"]
            whose = _shown(name if weights == "hub" else weights)
            word, terms = known[0] if known else ("other", f"the terms of {whose}")
        words.append(word)
        sentences.append(f"The {part} model's weights, {_shown(name)}: {terms}")
    strict = [word for word in words if word != "apache-2.0"]
    return ("other" if "other" in strict or len(set(strict)) > 1 else (strict or ["apache-2.0"])[0]), sentences


def write_card(folder: Path, name: str, metrics: Sequence[Mapping[str, Any]], config_yaml: str) -> None:
    """Leave `README.md` beside the weights, as the hub shows it: without the paths of this machine.

    Args:
        folder: a saved model's, whole but for its card.
        name: what it will be loaded by: a hub id, or a folder as the user gave it.
        metrics: `metrics.json`'s content, of each task.
        config_yaml: the run's resolved config.
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

{_what(saved, base)}

```python
import vlmvqa

print(vlmvqa.load("{name}").answer("photo.jpg", "what is this?").text)
```

## Scores

| task | metric | questions | model | majority baseline | shuffled images |
|---|---|---|---|---|---|
{"".join(_row(one) for one in metrics)}
- Majority baseline: the most frequent training answer of each question type.
- Shuffled images: the same questions, each with the image of another.
{"".join(_measured(one) for one in metrics)}
## Licences

{"".join(f"- {sentence}." + chr(10) for sentence in terms)}
## Configuration

```yaml
{yaml.safe_dump(_shown(config), sort_keys=False, allow_unicode=True).strip()}
```
""",
        encoding="utf-8",
    )


def _what(saved: Mapping[str, Any], base: str) -> str:
    """The sentence that says what kind of model it is, and what was tuned."""
    if base.startswith("."):
        named = "the model that lies beside (`base/`)"
    else:
        named = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"a local model (`{_shown(base)}`)"
    if "adapter" in saved:
        asked = saved["adapter"]["settings"]
        bits = f", over a base in {asked['bits']} bits" if asked["bits"] else ""
        kind = f"{METHODS[asked['method']]}, rank {asked['rank']}{bits}"
        return f"Adapters ({kind}) of {named}, which answer questions about pictures."
    if OURS in saved:
        origin = f"tuned from {named}" if base else "trained from random weights"
        return f"`{saved['architectures'][0]}` of transformers, {origin} to answer questions about pictures."
    return "A vision encoder, a projector and a language model that answer questions about pictures."


def _base(saved: Mapping[str, Any]) -> str:
    """What adapters lie over, or what a whole model was trained on from: a hub id or a folder; "": neither."""
    if "adapter" in saved:
        return str(saved["adapter"]["base"])
    return str((saved.get(OURS, saved).get("started_from") or {"model": ""})["model"])


def _shown(value: Any) -> Any:
    """A setting, or all within, without this machine's paths: a folder's name alone, of a run's `model/` the run's."""
    if isinstance(value, Mapping):
        return {key: _shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path = Path(value)
    return path.parent.name if path.name == "model" else path.name


def _row(metrics: Mapping[str, Any]) -> str:
    """A task's line in the table of scores."""
    columns = [
        metrics["metrics"][metrics["metric"]],
        *(metrics["controls"][name] for name in ("prior", "shuffled_images")),
    ]
    values = ["-" if column["overall"] is None else f"{column['overall']:.2f}" for column in columns]
    about = [f"{metrics['data']} {metrics['split']}", metric(metrics["metric"]).title, str(metrics["n"])]
    return f"| {' | '.join(about + values)} |\n"


def _measured(metrics: Mapping[str, Any]) -> str:
    return f"- Metric and prompt of {metrics['data']}: {metrics['metric_version']}; `{metrics['prompt']!r}`.\n"
