"""Answers saved as they come: an evaluation that was killed resumes from them and ends with the same file.

    folder/answers-<key>-<rank>.jsonl    {"batch": "<what was asked together>", "answers": [[id, text, log-p, cut]]}

What is kept is whole batches: an answer is the same to the bit only beside the same others. Every rank writes its own
file and reads all of them, so that a run may resume with another number of ranks. A line that the kill has cut is asked
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vlmvqa import ranks
from vlmvqa.data.example import Example

Kept = dict[str, list[list[Any]]]


class Journal:
    """The answers of one model under one decoding.

    Args:
        folder: where they are kept; made at the first answer.
        key: what answers depend on besides the batch: checkpoint, decoding, how images are read, the files of the data.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, f"answers-{_digest(key)[:12]}"

    def read(self) -> Kept:
        """What was kept, by batch."""
        kept: Kept = {}
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                kept[record["batch"]] = record["answers"]
        return kept

    def add(self, batch: str, answers: Sequence[Sequence[Any]]) -> None:
        """Keep a batch's answers; they are on their way to the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}-{ranks.rank()}.jsonl"
        line = json.dumps({"batch": batch, "answers": answers})
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # on a line of its own, whatever a kill has left before it

    def remove(self) -> None:
        """All is done: the results hold the answers."""
        for path in self.folder.glob("answers-*.jsonl"):
            path.unlink(missing_ok=True)


def batch_key(rows: Sequence[Example]) -> str:
    """What is asked together: images and questions, in order."""
    return _digest([[repr(row.image_id), [[repr(q.id), q.prompt] for q in row.questions]] for row in rows])


def _digest(content: Any) -> str:
    return blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
