"""The folder of a saved model: how it is found, and the names of its files. `checkpoint.py` reads and writes them."""

from __future__ import annotations

import sys
from pathlib import Path

from vlmvqa.errors import InputError
from vlmvqa.hub import hub_or_cache, when_offline
from vlmvqa.paths import EXPECTED, is_hub_id, missing_model

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
BASE = "base"  # a run's folder of the base model, if the base isn't stored elsewhere
# Files that are downloaded from a hub repository: no pickles, and no copies of the weights in other formats.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def stored_base(folder: Path, base: str) -> Path | None:
    """Return the folder of a base that is named relative to its adapter's folder; None for other names."""
    return (folder / base).resolve() if base.startswith(".") else None


def find(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a saved model: a run's `model/` (or newest checkpoint), the folder itself, or a download.

    Raises:
        InputError: there is no saved model.
    """
    folder = Path(path_or_hub_id).expanduser()
    for found in (folder / "model", folder):
        if (found / CONFIG).is_file():
            return found
    if folder.exists():
        return _newest_checkpoint(folder)
    if is_hub_id(str(path_or_hub_id)):
        return _download(str(path_or_hub_id))
    raise InputError(f"{missing_model(folder.absolute())}; {EXPECTED}")


def _newest_checkpoint(folder: Path) -> Path:
    """Return the newest undamaged checkpoint of a run without `model/`, and print its name."""
    from vlmvqa import ranks
    from vlmvqa.training.checkpoints import newest_intact

    checkpoint, complaints = newest_intact(folder)
    if checkpoint is None or not (checkpoint / CONFIG).is_file():
        reason = f"no checkpoint is complete ({complaints[0]})" if complaints else _why_not(checkpoint or folder)
        raise InputError(f"{checkpoint or folder} is not a saved model: {reason}; {EXPECTED}")
    if ranks.is_first():
        print(*complaints, f"{folder} has no model/ yet: loading {checkpoint}", sep="\n", file=sys.stderr)
    return checkpoint


def _why_not(path: Path) -> str:
    """Return a clause that describes an existing path without `config.json`."""
    if path.is_file():
        return "it is a file"
    if not any(path.iterdir()):
        return "it is an empty folder"
    if (path / "files.json").is_file():
        return f"it is a checkpoint without {CONFIG}, of an older version; resume its run with resume=auto"
    if (path / "run.json").is_file():
        return "it is a run without model/ and without a checkpoint; resume it with resume=auto"
    return f"it holds no {CONFIG}"


def _download(hub_id: str) -> Path:
    """Return the local snapshot of a hub id, from the cache if the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with hub_or_cache():
            return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{hub_id} is neither a folder here nor readable from the hub{when_offline()}; check the path "
            f"or the id, the network, and HF_TOKEN for gated weights ({missing_model(Path(hub_id).absolute())})"
        ) from error
