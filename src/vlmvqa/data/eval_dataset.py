"""Examples as a dataset for inference: encoded on demand, in the DataLoader's workers."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from vlmvqa.data.example import Example
from vlmvqa.data.processor import Processor
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.sequence.rows import Document


class EvalDataset(Dataset[Document | None]):
    """Encoded examples; None for one that cannot be read (with `on_bad_record=skip`).

    Args:
        with_targets: encode each question with its target, to score it; otherwise without, to generate an answer.
    """

    def __init__(
        self, examples: Sequence[Example], processor: Processor, bad_records: BadRecords, with_targets: bool = False
    ) -> None:
        self.examples, self.processor, self.bad_records = examples, processor, bad_records
        self.with_targets = with_targets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Document | None:
        example = self.examples[index]
        targets = [question.target if self.with_targets else None for question in example.questions]
        try:
            return self.processor.encode(example, targets)
        except InputError as error:
            self.bad_records.add_error(error)
            return None
