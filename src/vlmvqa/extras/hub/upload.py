"""Publish a trained model: upload it to a repository on the Hub, or copy it to a folder.

The published folder is self-contained: if the base model of adapters is stored only in the run's folder (`../base`), it
is included as `base/`. A base model on the Hub or in another folder is referenced and not copied; for another folder,
a message is printed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmvqa import ranks
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import PEFT_CONFIG
from vlmvqa.hub import hub_or_cache, when_offline
from vlmvqa.models.checkpoint import BASE, CONFIG
from vlmvqa.models.loading import stored_base


def refuse_upload(target: str) -> None:
    """Raise before training starts if the trained model could not be published.

    Args:
        target: a Hub id, or a folder, which begins with `.`, `/` or `~`.

    Raises:
        InputError: the id is malformed, no user is logged in, the Hub is unreachable, or the folder exists.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    if (output := _output_folder(target)) is not None:
        if output.exists():
            raise InputError(f"hub_id={target} exists already and is never overwritten; choose another folder")
        return
    if target.count("/") != 1:
        raise InputError(f"hub_id={target} should be <user or organisation>/<name>, or a folder: ./{target}")
    try:
        with hub_or_cache():
            HfApi().whoami()
    except (HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"hub_id={target}: no user is logged in to the Hub, or it cannot be reached{when_offline()}; set HF_TOKEN "
            f"or run `hf auth login` ({str(error).splitlines()[0]})"
        ) from error


def upload(folder: Path, target: str) -> str:
    """Publish a saved model's folder with its model card; return the URL or path.

    Args:
        folder: the saved model.
        target: a Hub id or a folder, as in `refuse_upload`.
    """
    from huggingface_hub import HfApi

    adapter = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("adapter") or {}
    base = str(adapter.get("base", ""))
    if base.startswith(("/", "~")):
        ranks.print_on_rank0(
            f"its base model {base} is not uploaded; publish it too, or merge first: launch/merge.py adapter={folder} "
            "output=..."
        )
    own_base = stored_base(folder, base)  # the base model if only the run's folder holds it
    if (output := _output_folder(target)) is not None:
        refuse_upload(target)
        unfinished = output.with_name(output.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        _copy(folder, own_base, unfinished, shutil.copy2)
        unfinished.rename(output)
        return str(output)
    api = HfApi()
    api.create_repo(target, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix="upload-") as temporary:
        complete = folder
        if own_base is not None:
            complete = Path(temporary) / "model"
            _copy(folder, own_base, complete, os.link)  # hard links need no space
        return str(api.upload_folder(repo_id=target, folder_path=complete, commit_message="Upload by vlmvqa"))


def _copy(folder: Path, own_base: Path | None, output: Path, copy: Callable[..., Any]) -> None:
    """Copy a model's folder, and its base model into it."""
    shutil.copytree(folder, output, copy_function=copy)
    if own_base is None:
        return
    shutil.copytree(own_base, output / BASE, copy_function=copy)
    for name, keys in ((CONFIG, ("adapter", "base")), (PEFT_CONFIG, ("base_model_name_or_path",))):
        config = json.loads((output / name).read_text(encoding="utf-8"))
        node = config
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = f"./{BASE}"
        (output / name).unlink()  # it may be a hard link to the run's file
        (output / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _output_folder(target: str) -> Path | None:
    """Return the folder to copy the model to; None for a Hub id."""
    return Path(target).expanduser().absolute() if target.startswith((".", "/", "~")) else None
