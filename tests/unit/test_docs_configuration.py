"""docs/configuration.md names every group, every choice and every key of conf/, and none that is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.configs import values
from tests.conftest import ROOT
from vlmvqa.paths import CONF

PAGE = (ROOT / "docs" / "configuration.md").read_text()
PARTS = ("vision", "projector", "language")  # of a model, whose keys are named one by one


def first_cells(text: str) -> list[str]:
    """What stands in backquotes in the first column of a page's first table."""
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows
    return [name for row in rows[0].splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def documented(marker: str) -> list[str]:
    return first_cells(PAGE.partition(f"<!-- keys of {marker} -->\n")[2])


def keys(node: Mapping[str, Any], prefix: str) -> set[str]:
    """The keys of a group, and those of a model's parts."""
    return {
        f"{prefix}.{key}.{inner}" if key in PARTS else f"{prefix}.{key}"
        for key, value in node.items()
        for inner in (value if key in PARTS else [""])
    }


def config(*overrides: str) -> dict[str, Any]:
    return values("train", *overrides)


def test_every_key_of_a_run() -> None:
    named = documented("train")
    assert len(named) == len(set(named)) and set(named) == set(config("adapt=lora", "dist=ddp"))


@pytest.mark.parametrize(
    ("marker", "overrides"),
    [
        ("model", ["model=tiny"]),
        ("pretrained", ["model=paligemma_3b"]),
        ("data", ["data=vqav2"]),
        ("decoding", []),
        ("adapt", ["adapt=lora"]),
    ],
)
def test_every_key_of_a_group(marker: str, overrides: list[str]) -> None:
    group = "model" if marker == "pretrained" else marker
    named = documented(marker)
    assert len(named) == len(set(named)) and set(named) == keys(config(*overrides)[group], group)


def test_every_key_of_the_strategies() -> None:
    """DeepSpeed's options are those of zero1 to zero3, and two keys those of FSDP."""
    named = documented("dist")
    found = {key for name in ("zero2", "fsdp") for key in keys(config(f"dist={name}")["dist"], "dist")}
    assert len(named) == len(set(named)) and set(named) == found


def test_every_group_and_choice() -> None:
    table = PAGE.partition("| group | sets | choices |\n")[2].partition("\n\n")[0].splitlines()[1:]
    named = {}
    for row in table:
        group, _, choices = (re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|"))
        named[group[0]] = choices
    assert named == {path.relative_to(CONF).as_posix(): stems(path) for path in CONF.rglob("*") if path.is_dir()}


def stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
