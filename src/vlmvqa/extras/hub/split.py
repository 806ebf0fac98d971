"""Read a split in parquet form, as the `data` group describes it."""

from __future__ import annotations

from types import ModuleType

from vlmvqa.config.compose import build_settings
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import refuse_unknown_options
from vlmvqa.errors import BadRecords
from vlmvqa.extras.hub import dataset


def read_hub(
    settings: DataSettings, source: ModuleType, split: str, max_samples: int | None, bad_records: BadRecords
) -> list[Example]:
    """Read a split in parquet form; the source's `arrange` brings it into the form of its own files."""
    examples = dataset.read(
        str(settings.hub),
        split,
        columns=build_settings(dataset.Columns, settings.columns, "data.columns"),
        prompt=settings.prompt,
        config=settings.hub_config,
        images=settings.hub_images,
        streaming=settings.streaming,
        max_samples=max_samples,
        bad_records=bad_records,
    )
    arrange = vars(source).get("arrange", lambda examples, split: examples)
    refuse_unknown_options(settings.options, arrange)
    return list(arrange(examples, split, **settings.options))
