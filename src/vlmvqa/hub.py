"""What is asked of the hub, and what is said where it does not give it.

Everywhere: weights from .safetensors alone, since a pickle runs what is in it; no code but transformers' own; and
with HF_HUB_OFFLINE=1 nothing is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vlmvqa.errors import InputError

# For every `from_pretrained`; transformers would ask at the terminal.
OWN_CODE: Final[dict[str, Any]] = {"trust_remote_code": False}
# For every one that reads weights; transformers would fall back on pytorch_model.bin.
SAFE_WEIGHTS: Final[dict[str, Any]] = {**OWN_CODE, "use_safetensors": True}
SECONDS = 5  # for the hub to answer a first request
REMEMBERED = 60  # seconds for which a hub that did not answer is not asked again

_unreached = (float("-inf"), "")  # when the hub did not answer, and why


def unread(what: str, error: Exception) -> InputError:
    """The sentence for something of the hub's, or of a folder like it, that cannot be had.

    Args:
        what: a setting with its value, or words that name it.
    """
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return InputError(f"{what} needs code of its own to be run, which is never done here; name another")
    if "named model.safetensors" in said:
        return InputError(
            f"{what} has no .safetensors, and pickled weights, which can run code, are never read here; save it again "
            "with transformers' save_pretrained, or name another"
        )
    if "Should have a `model_type` key" in said:
        return InputError(f"{what} is no model of transformers: it has no config.json with a model_type; name another")
    if "does not recognize this architecture" in said:
        return InputError(f"{what} is of a model_type that this version of transformers does not know; update it")
    return InputError(
        f"{what} cannot be read from the hub or disk{when_offline()}; check the name, the network, and for gated "
        "weights accept the licence and set HF_TOKEN or run `hf auth login` "
        f"({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    )


def unreachable() -> str:
    """Return why the hub cannot be reached, as a clause; "" if it answers, or HF_HUB_OFFLINE is set.

    Sends one request with a short timeout and remembers a failure for a minute. huggingface_hub retries for as long.
    """
    global _unreached
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    if not _remembered():
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except (HTTPError, OSError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            _unreached = (time.monotonic(), f" ({constants.ENDPOINT} cannot be reached: {said})")
    return _remembered()


@contextmanager
def hub_or_cache(name: str | None = None) -> Iterator[None]:
    """In the block, read only from the local cache if the hub does not answer.

    Args:
        name: the hub id or folder to be read; for a folder the hub is not asked.
    """
    from huggingface_hub import constants

    if (name is not None and Path(name).is_dir()) or not unreachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def when_offline() -> str:
    """Return the clause that explains a failure by the network: switched off by the user or unreachable; else ""."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return " (HF_HUB_OFFLINE is set, so that nothing is fetched)"
    return _remembered()


def _remembered() -> str:
    """Return why the hub could not be reached in the last minute, or ""."""
    when, reason = _unreached
    return reason if time.monotonic() - when <= REMEMBERED else ""
