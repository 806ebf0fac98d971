"""The model card: what was trained on what, how it scored beside its controls, and whose licences apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.inference.scores import metric

# Weights that are known by their names, and under which terms they are given: the hub's word, and a sentence.
LICENCES = {
    "idefics2": ("apache-2.0", "Apache-2.0"),
    "gemma": ("gemma", "[Gemma terms of use](https://ai.google.dev/gemma/terms)"),
    "dinov2": ("apache-2.0", "Apache-2.0"),
}


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
            word, terms = known[0] if known else ("other", f"the terms of {name if weights == 'hub' else weights}")
        words.append(word)
        sentences.append(f"The {part} model's weights, {name}: {terms}")
    strict = [word for word in words if word != "apache-2.0"]
    return ("other" if "other" in strict or len(set(strict)) > 1 else (strict or ["apache-2.0"])[0]), sentences


def write_card(folder: Path, name: str, metrics: Sequence[Mapping[str, Any]], config_yaml: str) -> None:
    """Leave `README.md` beside the weights, as the hub shows it.

    Args:
        metrics: `metrics.json`'s content, of each task.
        config_yaml: the run's resolved config.
    """
    config = yaml.safe_load(config_yaml)
    licence, terms = licences(config)
    terms.append(f"The data's terms: those of the publisher of {', '.join(one['data'] for one in metrics)}")
    (folder / "README.md").write_text(
        f"""---
library_name: vlmvqa
pipeline_tag: visual-question-answering
license: {licence}
{_base_model(config["model"])}---

# {name}

A vision encoder, a projector and a language model that answer questions about pictures.

```python
import vlmvqa

print(vlmvqa.load("{name}").answer("photo.jpg", "what is this?").text)
```

## Scores

| task | metric | questions | model | prior | shuffled images |
|---|---|---|---|---|---|
{"".join(_row(one) for one in metrics)}
Prior: the most frequent training answer of each question type. {" ".join(_measured(one) for one in metrics)}

## Licences

{"".join(f"- {sentence}." + chr(10) for sentence in terms)}
## Configuration

```yaml
{config_yaml.strip()}
```
""",
        encoding="utf-8",
    )


def _base_model(model: Mapping[str, Any]) -> str:
    """The hub's line about what was tuned, where that is on the hub."""
    name = str(model.get("pretrained", ""))
    on_hub = model.get("weights") == "hub" and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return f"base_model: {name}\n" if on_hub else ""


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
    return f"{metrics['data']}: {metrics['metric_version']}, prompt `{metrics['prompt']!r}`."
