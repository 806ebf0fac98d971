"""Several ranks generate bit for bit the same answers as one.

Run as a module, this file is the program of each rank:
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.test_answers FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.unit.test_predictor import examples, predictor
from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import BadRecords
from vlmvqa.training import distributed

# Number of questions per image, and generation settings.
CASES: dict[str, dict[str, Any]] = {
    "an uneven number of batches": {"counts": (2, 1, 5, 3, 1, 4, 2), "batch_size": 3},
    "fewer batches than ranks": {"counts": (2, 1, 5), "batch_size": 8},
    "no batch": {"counts": (), "batch_size": 8},
    "an image over several rows": {"counts": (30, 1, 2), "batch_size": 2, "row_text_tokens": 32},
    "beams": {"counts": (2, 1, 5, 3), "batch_size": 1, "decoding": {"num_beams": 2}},
    "sampled": {"counts": (2, 1, 5, 3), "batch_size": 1, "decoding": {"temperature": 1.0}},
    "workers": {"counts": (2, 1, 5, 3, 1), "batch_size": 1, "workers": 1},
    "unreadable images": {"counts": (2, 1, 5, 3, 1, 4), "batch_size": 2, "missing": (2, 5)},
    "a rank that reads no image": {"counts": (1, 4), "batch_size": 1, "missing": (0,)},
}


def answer(
    folder: Path,
    counts: tuple[int, ...],
    missing: tuple[int, ...] = (),
    decoding: dict[str, Any] | None = None,
    **how: Any,
) -> dict[str, Any]:
    asked = [
        replace(example, image=folder / f"missing {n}.jpg") if n in missing else example
        for n, example in enumerate(examples(counts))
    ]
    bad = BadRecords("skip", folder / "skipped.jsonl")
    model, batches = predictor(**(decoding or {})), []
    model.model.vision.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    answers = model.answer_examples(asked, bad_records=bad, **how)
    return {
        "batches": ranks.gather(batches),  # images of each batch of each rank
        # A list, because order matters; `hex` shows every bit.
        "answers": [(name, one.text, one.log_probability.hex()) for name, one in answers.items()],
        "skipped": sorted(bad.listed()),
    }


def work(root: Path) -> None:
    distributed.start(DistSettings("ddp"), cpu=True)
    for number, (name, case) in enumerate(CASES.items()):
        found = ranks.gather(answer(root / str(number), **case))
        assert all(one == found[0] for one in found), f"{name}: the ranks hold different answers"
        if ranks.is_first():
            (root / f"{name}.json").write_text(json.dumps(found[0]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folder of results by number of ranks."""
    folders = {}
    for count in (1, 2):
        folders[count] = tmp_path_factory.mktemp(f"ranks{count}")
        process = forks.ranks(count, ["-m", "tests.distributed.test_answers", str(folders[count])])
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-3000:]
    return folders


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_answer_as_one(found: dict[int, Path], name: str) -> None:
    one, two = (json.loads((found[count] / f"{name}.json").read_text()) for count in (1, 2))
    assert two["answers"] == one["answers"]
    (whole,) = one["batches"]
    # The same batches, none of them twice.
    assert sorted(images for rank in two["batches"] for images in rank) == sorted(whole)
    if whole and not CASES[name].get("missing"):
        assert two["batches"] == [whole[::2], whole[1::2]]
    missing = CASES[name].get("missing", ())
    asked = examples(CASES[name]["counts"])
    expected = [q.id for n, example in enumerate(asked) if n not in missing for q in example.questions]
    assert [answer[0] for answer in two["answers"]] == expected
    assert len(two["skipped"]) == len(one["skipped"]) == len(missing)
    assert all(f"missing {n}.jpg" in listed for n, listed in zip(missing, two["skipped"], strict=True))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
