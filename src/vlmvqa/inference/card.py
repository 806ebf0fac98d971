"""The model card: what was trained on what, how it scored beside its controls, and whose licences apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.errors import InputError
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
    licence, terms = licences(yaml.safe_load(config_yaml))
    terms.append(f"The data's terms: those of the publisher of {', '.join(one['data'] for one in metrics)}")
    (folder / "README.md").write_text(
        f"""---
library_name: vlmvqa
pipeline_tag: visual-question-answering
license: {licence}
---

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


def refuse_upload(hub_id: str) -> None:
    """Stop before a week of training if its end could not be uploaded.

    Raises:
        InputError: the id is malformed, or nobody is logged in, or the hub is out of reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    if hub_id.count("/") != 1:
        raise InputError(f"hub_id={hub_id} should be <user or organisation>/<name>")
    try:
        HfApi().whoami()
    except (HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"hub_id={hub_id}: nobody is logged in to the hub, or it cannot be reached; set HF_TOKEN or run "
            f"`huggingface-cli login` ({str(error).splitlines()[0]})"
        ) from error


def upload(folder: Path, hub_id: str) -> str:
    """Upload a saved model's folder, card included; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(hub_id, exist_ok=True)
    return str(api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload by vlmvqa"))
