"""Run VLMEvalKit with a model of this project.

    python -m vlmvqa.evaluation.vlmevalkit_adapter.run checkpoint=runs/demo --data vlmvqa_shapes_val

Arguments with `=` and without a dash are the model's (checkpoint, device, dtype, source; name: its name in VLMEvalKit's
results) or `tables`, the folder of the tables that launch/prepare.py wrote (default: VLMEvalKit's LMUData). All others
are those of VLMEvalKit's run.py. The same without this command, in VLMEvalKit's vlmeval/config.py:

    from vlmvqa.evaluation.vlmevalkit_adapter.model import VlmVqa
    supported_VLM["demo"] = partial(VlmVqa, checkpoint="/folder/runs/demo")
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vlmvqa.errors import InputError

KEYS = ("checkpoint", "device", "dtype", "source", "name", "tables")


def split_arguments(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return our settings and VLMEvalKit's arguments.

    Raises:
        InputError: a setting is unknown, or `checkpoint` is missing.
    """
    ours = dict(word.split("=", 1) for word in words if "=" in word.partition("-")[0])
    theirs = [word for word in words if "=" not in word.partition("-")[0]]
    if unknown := set(ours) - set(KEYS):
        raise InputError(f"{min(unknown)}= is unknown; use {', '.join(KEYS)}, or an option of VLMEvalKit's run.py")
    if "checkpoint" not in ours:
        raise InputError("checkpoint=... is missing: the run or model folder to score")
    return ours, theirs


def own_tables(arguments: Sequence[str]) -> list[str]:
    """Return VLMEvalKit's `--data-config` for the tables among `--data` that launch/prepare.py wrote.

    VLMEvalKit scores only tables of known names; this one lets it score ours as short answers.
    """
    if "--data" not in arguments or "--data-config" in arguments:
        return []
    rest = arguments[arguments.index("--data") + 1 :]
    end = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
    own = {name: {"class": "ImageVQADataset", "dataset": name} for name in rest[:end] if name.startswith("vlmvqa_")}
    return ["--data-config", json.dumps(own)] if own else []


def main(words: Sequence[str]) -> None:
    """Register the model and call VLMEvalKit's run.py."""
    ours, theirs = split_arguments(words)
    if importlib.util.find_spec("vlmeval") is None:
        raise InputError("VLMEvalKit is not installed; docs/harnesses.md describes its environment")
    model = {key: value for key, value in ours.items() if key not in ("name", "tables")}
    name = ours.get("name") or Path(ours["checkpoint"]).resolve().name
    model["checkpoint"] = str(Path(ours["checkpoint"]).expanduser().resolve())
    if "tables" in ours:
        os.environ["LMUData"] = str(Path(ours["tables"]).expanduser().resolve())  # noqa: SIM112
    sys.argv = ["run.py", *theirs, *own_tables(theirs), "--model", name]

    import vlmeval

    sys.path.insert(0, str(Path(vlmeval.__file__).parents[1]))  # run.py is next to the package
    import run
    from vlmeval.config import supported_VLM

    from vlmvqa.evaluation.vlmevalkit_adapter.model import VlmVqa

    supported_VLM[name] = partial(VlmVqa, **model)
    run.main()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
