"""Where a trained model lies: its folder and the files in it. `checkpoint.py` reads and writes them."""

from __future__ import annotations

from pathlib import Path

from vlmvqa.errors import InputError
from vlmvqa.hub import when_offline

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
BASE = "base"  # a folder of a run's: what its adapters lie over, where that lies nowhere else
# Of a hub repository, what is ours or transformers' own: never a pickle, nor the weights once more in another form.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def kept_base(folder: Path, base: str) -> Path | None:
    """Where a base lies that is named as it is seen from its adapters' folder; None: it is named by itself."""
    return (folder / base).resolve() if base.startswith(".") else None


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here may be one of the hub's: `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def find(path_or_hub_id: str | Path) -> Path:
    """The folder of a trained model: a run's, its `model/`, or a hub id's, which is fetched.

    Raises:
        InputError: there is none.
    """
    folder = Path(path_or_hub_id).expanduser()
    if (folder / "model" / CONFIG).is_file():  # a run's folder
        return folder / "model"
    if (folder / CONFIG).is_file():
        return folder
    if folder.exists():
        raise InputError(
            f"{folder} is not a saved model: it holds no {CONFIG}; name a run's folder or its model/ folder"
        )
    if not is_hub_id(str(path_or_hub_id)):
        raise InputError(f"{path_or_hub_id}: no such folder; name a run's folder, its model/ folder, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{path_or_hub_id} is neither a folder here nor readable from the hub{when_offline()}; check the path "
            "or the id, the network, and HF_TOKEN for gated weights"
        ) from error
