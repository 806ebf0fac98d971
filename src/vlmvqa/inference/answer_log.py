"""A log of the answers of a running evaluation, from which a killed evaluation resumes with the same result.

    folder/answers-<key>-<rank>.jsonl    {"batch": "<key of the batch>", "answers": [[id, text, log-p, cut]]}

Only complete batches are logged, because an answer is reproducible to the bit only in the same batch. Every rank writes
its own file and reads all files, so that a run may resume with another number of ranks. If a kill cuts off a line, its
batch is answered again.
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


class AnswerLog:
    """A log of the answers of one model under one set of generation settings.

    Args:
        folder: folder of the log; created at the first answer.
        key: all that answers depend on, except the batch: checkpoint, decoding, image settings, files of the data.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, f"answers-{_digest(key)[:12]}"

    def read(self) -> Kept:
        """Return the logged answers by batch key."""
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
        """Append a batch's answers; they survive a kill of the process once this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}-{ranks.rank()}.jsonl"
        line = json.dumps({"batch": batch, "answers": answers})
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # starts on a new line, in case a kill cut the one before

    @staticmethod
    def batch_key(rows: Sequence[Example]) -> str:
        """Return a hash of a batch: its images and questions, in order."""
        return _digest(
            [
                [
                    repr(row.image_id),
                    [[repr(q.id), q.prompt, *((t.prompt, t.target) for t in q.history)] for q in row.questions],
                ]
                for row in rows
            ]
        )

    def remove(self) -> None:
        """Delete the log, once the results hold the answers."""
        for path in self.folder.glob("answers-*.jsonl"):
            path.unlink(missing_ok=True)


def _digest(content: Any) -> str:
    return blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
