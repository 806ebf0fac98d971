"""A finished model, put where others find it: a repository of the hub, or a folder of one's own.

What is published is enough by itself: where adapters lie over a base that only their run keeps (`../base`), it goes
with them, as `base/`. One that lies elsewhere, on the hub or in another folder, is named and not copied; that one in
another folder stays behind is said.
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
from vlmvqa.models.model_folder import BASE, CONFIG, kept_base


def refuse_upload(target: str) -> None:
    """Stop before a week of training if its end could not be published.

    Args:
        target: a hub id, or a folder, which begins with `.`, `/` or `~`.

    Raises:
        InputError: the id is malformed, or nobody is logged in, or the hub is out of reach; or the folder is there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    if _is_folder(target):
        if _folder(target).exists():
            raise InputError(f"hub_id={target} is there already, and nothing is written over it; name another folder")
        return
    if target.count("/") != 1:
        raise InputError(f"hub_id={target} should be <user or organisation>/<name>, or a folder: ./{target}")
    try:
        with hub_or_cache():
            HfApi().whoami()
    except (HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"hub_id={target}: nobody is logged in to the hub, or it cannot be reached{when_offline()}; set HF_TOKEN "
            f"or run `hf auth login` ({str(error).splitlines()[0]})"
        ) from error


def upload(folder: Path, target: str) -> str:
    """Publish a saved model's folder, card included; where it is then.

    Args:
        target: as of `refuse_upload`.
    """
    from huggingface_hub import HfApi

    base = _named_base(folder)
    if base.startswith(("/", "~")):
        ranks.say(
            f"its base {base} stays here; publish that too, or merge first: launch/merge.py adapter={folder} output=..."
        )
    if _is_folder(target):
        where = _folder(target)
        refuse_upload(target)
        unfinished = where.with_name(where.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        _gather(folder, unfinished, shutil.copy2)
        unfinished.rename(where)
        return str(where)
    api = HfApi()
    api.create_repo(target, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix="upload-") as made:
        whole = folder
        if _base_of(folder) is not None:  # not copied: the same files under a second name
            whole = Path(made) / "model"
            _gather(folder, whole, os.link)
        return str(api.upload_folder(repo_id=target, folder_path=whole, commit_message="Upload by vlmvqa"))


def _gather(folder: Path, where: Path, copy: Callable[..., Any]) -> None:
    """A model's folder, and in it the base that only its run has."""
    shutil.copytree(folder, where, copy_function=copy)
    base = _base_of(folder)
    if base is None:
        return
    shutil.copytree(base, where / BASE, copy_function=copy)
    for name, place in ((CONFIG, ("adapter", "base")), (PEFT_CONFIG, ("base_model_name_or_path",))):
        config = json.loads((where / name).read_text(encoding="utf-8"))
        node = config
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = f"./{BASE}"
        (where / name).unlink()  # it may be the run's own file
        (where / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _base_of(folder: Path) -> Path | None:
    """What a folder's adapters lie over, where only their run has it."""
    return kept_base(folder, _named_base(folder))


def _named_base(folder: Path) -> str:
    """What a folder's adapters lie over, as they name it; "" for a whole model."""
    if not (folder / CONFIG).is_file():
        return ""
    adapter = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("adapter") or {}
    return str(adapter.get("base", ""))


def _is_folder(target: str) -> bool:
    return target.startswith((".", "/", "~"))


def _folder(target: str) -> Path:
    return Path(target).expanduser().absolute()
