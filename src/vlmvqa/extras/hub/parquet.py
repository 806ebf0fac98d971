"""Access to the rows of a split: in a folder of parquet files, or on the Hub."""

from __future__ import annotations

import importlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import hub_or_cache, when_offline

# Datasets that are loading scripts, which `datasets` no longer runs, and copies of them in parquet format.
PARQUET_COPIES = {"HuggingFaceM4/VQAv2": "lmms-lab/VQAv2", "HuggingFaceM4/COCO": "lmms-lab/COCO-Caption"}
SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+")
BATCH_ROWS = 64
MAX_ROWS = 2**62  # end of an open slice if the number of rows is unknown
FAILURES = (OSError, RuntimeError, ValueError)  # raised by `datasets`, in addition to its DatasetsError


def open_split(
    hub: str, config: str | None, split: str, streaming: bool, max_samples: int | None
) -> tuple[ParquetTable | HubTable, range]:
    """Return the table of a split and the numbers of the rows to read.

    Args:
        hub: a Hub id or a folder.
        config: a configuration, or None; `{split}` in it is replaced by the split's name.
        split: the split's name, with an optional slice.
        streaming: download rows while reading instead of the complete split first.
        max_samples: most rows to read.

    Raises:
        InputError: a package or the dataset is missing, the dataset is a loading script, or it has no such split.
    """
    name = split.partition("[")[0]
    # If each split has its own configuration, that configuration has a single split, with any name.
    own = config is not None and "{split}" in config
    config = config and config.replace("{split}", name)
    folder = _folder(hub)
    known = _local_splits(folder, config) if folder else _hub_splits(hub, config)
    own = own and len(known) == 1
    selected = parse_split(split, [name] if own else known, hub, max_samples)
    inner = next(iter(known)) if own else name
    table = ParquetTable(known[inner], f"{hub} {name}") if folder else HubTable(hub, config, inner, streaming)
    return table, _selected_rows(selected, table.total, table.where)


def _folder(hub: str) -> Path | None:
    """Return the folder; None for a Hub id."""
    path = Path(hub).expanduser()
    if not path.is_dir() and (hub.startswith((".", "/", "~")) or hub.count("/") > 1):
        raise InputError(f"data.hub={hub}: there is no such folder; correct the path, or use a Hub id")
    return path if path.is_dir() else None


def _selected_rows(selected: Slice, total: int | None, where: str) -> range:
    """Return the numbers of the rows in a slice of a table; a total of None is unknown."""
    if selected.random_count is not None:
        raise InputError(f"{where}: rows cannot be sampled at random ('{selected.text}'); use a slice, or data.root")
    if total is not None:
        numbers = selected.indices(total, where, "rows")
        assert isinstance(numbers, range)
        return numbers
    if any(bound and (bound.endswith("%") or bound.startswith("-")) for bound in (selected.start, selected.stop)):
        raise InputError(
            f"{where}: '{selected.text}' depends on the number of rows, which is unknown while streaming; "
            "use row numbers, or set data.streaming=false"
        )
    return range(int(selected.start or 0), int(selected.stop or MAX_ROWS))[: selected.max_samples]


def _refuse_unknown(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in known:
            near = suggest(name, known)
            raise InputError(f"{where} has no column '{name}', only {', '.join(known)}; set data.columns{near}")


# --- a folder of parquet files --------------------------------------------------------------------------


class ParquetTable:
    """The rows of a split in local parquet files; the attributes are those of `HubTable`."""

    def __init__(self, files: Sequence[Path], where: str) -> None:
        parquet = require("pyarrow.parquet")
        self.where = where
        try:
            self.files = [parquet.ParquetFile(path) for path in files]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{where}: its parquet files are unreadable ({_line(error)}); download them again"
            ) from error
        self.total = sum(file.metadata.num_rows for file in self.files)
        self.columns: Sequence[str] = self.files[0].schema_arrow.names

    def rows(self, numbers: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield rows; files and batches that contain none of them are skipped."""
        _refuse_unknown(columns, self.columns, self.where)
        first = 0  # number of the first row of the file or batch
        for file in self.files:
            if first + file.metadata.num_rows <= numbers.start or first >= numbers.stop:
                first += file.metadata.num_rows
                continue
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                overlap = range(max(numbers.start, first), min(numbers.stop, first + len(batch)))
                if overlap:
                    yield from batch.slice(overlap.start - first, len(overlap)).to_pylist()
                first += len(batch)
                if first >= numbers.stop:
                    return


def _local_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Return each split's files: `val-00000-of-00068.parquet`, `val.parquet` or `val/0000.parquet` belong to `val`."""
    inside = folder / config if config else folder
    if not inside.is_dir():
        known = sorted(path.name for path in folder.iterdir() if path.is_dir())
        near = suggest(config or "", known)
        there = ", ".join(known) or "files"
        raise InputError(f"{folder} has no folder {config}, only {there}; set data.hub_config{near}")
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(inside.rglob("*.parquet")):
        shard = SHARD.fullmatch(path.stem)
        splits[shard["split"] if shard else path.parent.name if path.stem.isdecimal() else path.stem].append(path)
    if not splits:
        raise InputError(f"{inside} has no .parquet file; set data.hub to a folder with parquet files, or to a Hub id.")
    for name, paths in splits.items():
        folders = sorted({path.parent.relative_to(folder).as_posix() for path in paths})
        if len(folders) > 1:
            raise InputError(
                f"{folder} has files of {name} in {' and '.join(folders)}; set data.hub_config to one of them"
            )
    return dict(splits)


# --- the Hub --------------------------------------------------------------------------------------------


class HubTable:
    """The rows of a split on the Hub, with images as the bytes of their files.

    Attributes:
        where: name for error messages.
        total: number of rows; None if unknown before they are read.
        columns: column names; None if unknown before the first row is read.
    """

    def __init__(self, hub: str, config: str | None, split: str, streaming: bool) -> None:
        self.datasets = _datasets()
        self.hub, self.where = hub, f"{hub} {split}"
        self.failures = (*FAILURES, self.datasets.exceptions.DatasetsError)
        try:
            with hub_or_cache(hub):
                self.data = self.datasets.load_dataset(hub, config, split=split, streaming=streaming)
        except self.failures as error:
            raise _unavailable(hub, error) from error
        self.streaming = streaming
        self.columns: Sequence[str] | None = self.data.column_names
        known = (self.data.info.splits or {}).get(split)
        self.total: int | None = ((known and known.num_examples) or None) if streaming else len(self.data)

    def rows(self, numbers: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield rows, downloading them first if they are streamed."""
        if self.columns is not None:
            _refuse_unknown(columns, self.columns, self.where)
        data = self.data.select_columns(list(columns))
        for name, feature in (data.features or {}).items():
            if isinstance(feature, self.datasets.Image):
                data = data.cast_column(name, self.datasets.Image(decode=False))
        try:
            if self.streaming:
                yield from itertools.islice(data.skip(numbers.start), len(numbers))
            else:
                yield from data.select(numbers)
        except self.failures as error:
            raise _unavailable(self.hub, error) from error


def _hub_splits(hub: str, config: str | None) -> dict[str, list[Path]]:
    """Return the names of a dataset's splits, without files, which `datasets` finds."""
    datasets = _datasets()
    try:
        with hub_or_cache(hub):
            return {name: [] for name in datasets.get_dataset_split_names(hub, config)}
    except FAILURES as error:
        raise _unavailable(hub, error) from error


def _datasets() -> ModuleType:
    """Return the library with loading scripts disabled; version 3 would prompt at the terminal to run one."""
    datasets = require("datasets")
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    return datasets


def _unavailable(hub: str, error: Exception) -> InputError:
    """Return the error for a dataset that `datasets` cannot load."""
    message = _line(error)
    if any(words in message for words in ("scripts are no longer supported", "custom code", "dataset script")):
        copy = PARQUET_COPIES.get(hub)
        form = f"data.hub={copy}" if copy else "data.hub to a copy of the dataset in parquet format"
        return InputError(f"{hub} is a loading script, which is not run; set {form}")
    return InputError(
        f"the dataset {hub} cannot be read from the Hub{when_offline()} ({message}); check data.hub, data.hub_config "
        "and the network, and for a gated dataset accept its terms and set HF_TOKEN"
    )


def require(module: str, what: str = "data.hub") -> ModuleType:
    """Import a module of the install extra `hub` that a setting or command needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{what} needs the package {package}; install it with: pip install 'vlmvqa[hub]'") from None


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
