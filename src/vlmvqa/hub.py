"""Hugging Face Hub access: safe-loading flags and error messages.

Weights are read only from .safetensors files, since loading a pickle runs code; models run no code except
transformers' own; HF_HUB_OFFLINE=1 disables all requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError
from tqdm import tqdm

from vlmvqa.errors import InputError
from vlmvqa.paths import missing_model
from vlmvqa.ranks import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For every `from_pretrained`; by default transformers asks at the terminal.
OWN_CODE: Final[dict[str, Any]] = {"trust_remote_code": False}
# For every `from_pretrained` that reads weights; by default transformers falls back on pytorch_model.bin.
SAFE_WEIGHTS: Final[dict[str, Any]] = {**OWN_CODE, "use_safetensors": True}
# Files that are downloaded from a hub repository: no pickles, and no copies of the weights in other formats.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
SECONDS = 5  # timeout of the first request
RETRY_AFTER = 60  # seconds before another request after a failed one

_unreached = (float("-inf"), "")  # time of the last failed request, and the reason


def unread(what: str, error: Exception) -> InputError:
    """Return the error for something that cannot be read from the Hub or from a folder in its format.

    Args:
        what: the setting with its value, or the name of what was read.
        error: the error that the library raised.
    """
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return InputError(f"{what} requires running its own code, which is never done; choose another")
    if "named model.safetensors" in message:
        return InputError(
            f"{what} has no .safetensors, and pickled weights, which can run code, are never read; save it again with "
            "transformers' save_pretrained, or choose another"
        )
    if "Should have a `model_type` key" in message:
        return InputError(
            f"{what} is not a transformers model: it has no config.json with a model_type; choose another"
        )
    if "model type `vlmvqa`" in message:
        return InputError(
            f"{what} is a model of this project, not of transformers; to train it further, name it as init_from"
        )
    if "does not recognize this architecture" in message:
        return InputError(
            f"{what} has a model_type that this version of transformers does not know; update transformers"
        )
    return InputError(
        f"{what} cannot be read from the hub or disk{when_offline()}; check the name, the network, and for gated "
        "weights accept the licence and set HF_TOKEN or run `hf auth login` "
        f"({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    )


def unreachable() -> str:
    """Return why the Hub cannot be reached, as a clause; "" if it responds, or HF_HUB_OFFLINE is set.

    Send one request with a short timeout and cache a failure for a minute, the time that huggingface_hub would retry.
    """
    global _unreached
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    if not _recent_failure():
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except (HTTPError, OSError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            _unreached = (time.monotonic(), f" ({constants.ENDPOINT} cannot be reached: {message})")
    return _recent_failure()


@contextmanager
def hub_or_cache(name: str | None = None) -> Iterator[None]:
    """Read only from the local cache in the block if the Hub is unreachable; `name` is a Hub id or a folder."""
    from huggingface_hub import constants

    if (name is not None and Path(name).exists()) or not unreachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def reading(what: str, name: str | None = None, *more: type[Exception]) -> Iterator[None]:
    """Read from the hub or its local cache in the block; turn errors into an `InputError` that names `what`.

    Args:
        what: as in `unread`.
        name: a hub id, or a file or folder, which needs no hub.
        more: errors that mean a failure to read, in addition to the usual ones.
    """
    errors: tuple[type[Exception], ...] = (OSError, ValueError, SafetensorError, *more)
    try:
        with hub_or_cache(name):
            yield
    except InputError:
        raise
    except errors as error:
        raise unread(what, error) from error


def when_offline() -> str:
    """Return the clause that explains a failure by HF_HUB_OFFLINE or an unreachable Hub, or ""."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return " (HF_HUB_OFFLINE is set, so nothing is downloaded)"
    return _recent_failure()


def _recent_failure() -> str:
    """Return why the Hub could not be reached in the last minute, or ""."""
    when, reason = _unreached
    return reason if time.monotonic() - when <= RETRY_AFTER else ""


@contextmanager
def loading_bar() -> Iterator[None]:
    """Replace transformers' "Loading weights" bar in the block by ours, shown if loading takes over a second."""
    from transformers.utils.logging import set_tqdm_hook

    def replacement(_: Any, arguments: tuple[Any, ...], __: dict[str, Any]) -> tqdm[Any]:
        return bar(*arguments, doing="loading weights", unit="tensors", delay=1.0)

    before = set_tqdm_hook(replacement)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or local folder.

    Raises:
        InputError: it cannot be read, or has no EOS token to end answers with.
    """
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {name}", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **OWN_CODE)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no EOS token, which ends every answer; choose another")
    return tokenizer


def download(hub_id: str) -> Path:
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
