"""What is asked of the hub, and what is said where it does not give it.

Everywhere: weights from .safetensors alone, since a pickle runs what is in it; no code but transformers' own; and
with HF_HUB_OFFLINE=1 nothing is asked.
"""

from __future__ import annotations

from typing import Any, Final

from vlmvqa.errors import InputError

# For every `from_pretrained`; transformers would ask at the terminal.
OWN_CODE: Final[dict[str, Any]] = {"trust_remote_code": False}
# For every one that reads weights; transformers would fall back on pytorch_model.bin.
SAFE_WEIGHTS: Final[dict[str, Any]] = {**OWN_CODE, "use_safetensors": True}
SECONDS = 5  # for the hub to answer a first request


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
    """Return why the hub cannot be reached, as a clause; "": it answers, or HF_HUB_OFFLINE is set.

    One request with a short timeout: huggingface_hub retries for up to a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except (HTTPError, OSError) as error:
        return f" ({constants.ENDPOINT} cannot be reached: {' '.join(str(error).split()) or type(error).__name__})"
    return ""


def when_offline() -> str:
    """What explains a failure where the user has cut the network off; else nothing."""
    from huggingface_hub import constants

    return " (HF_HUB_OFFLINE is set, so that nothing is fetched)" if constants.HF_HUB_OFFLINE else ""
