"""A split as a table of rows: of a folder of parquet files, or of the hub."""

from __future__ import annotations

import importlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import hub_or_cache, when_offline

# Loading scripts, which `datasets` no longer runs, and where the same data are in parquet.
PARQUET_FORM = {"HuggingFaceM4/VQAv2": "lmms-lab/VQAv2", "HuggingFaceM4/COCO": "lmms-lab/COCO-Caption"}
SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+")
ROWS_AT_A_TIME = 64
FAILURES = (OSError, RuntimeError, ValueError)  # of `datasets`, beside its own DatasetsError


class Table(Protocol):
    """The rows of a split."""

    where: str  # for errors
    total: int | None  # rows; None: not known before they are read
    columns: Sequence[str] | None  # None: not known before the first row is read

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The chosen rows with these of their columns."""


def open_split(
    hub: str, config: str | None, split: str, streaming: bool, max_samples: int | None
) -> tuple[Table, Slice]:
    """The table of a split, and what is selected of it.

    Args:
        hub, config, split, streaming, max_samples: as in `hub.read`.

    Raises:
        InputError: a package or the data set is missing, it is a loading script, or has no such split.
    """
    name = split.partition("[")[0]
    # Where each split is a configuration, that has one split, called what it may.
    own = config is not None and "{split}" in config
    config = config and config.replace("{split}", name)
    folder = _folder(hub)
    known = _local_splits(folder, config) if folder else _hub_splits(hub, config)
    own = own and len(known) == 1
    selected = parse_split(split, [name] if own else known, hub, max_samples)
    inner = next(iter(known)) if own else name
    if folder:
        return ParquetTable(known[inner], f"{hub} {name}"), selected
    return HubTable(hub, config, inner, streaming), selected


def _folder(hub: str) -> Path | None:
    """The folder, unless it is an id of the hub."""
    path = Path(hub).expanduser()
    if not path.is_dir() and (hub.startswith((".", "/", "~")) or hub.count("/") > 1):
        raise InputError(f"data.hub={hub}: there is no such folder; correct the path, or give an id of the hub")
    return path if path.is_dir() else None


def chosen_rows(selected: Slice, table: Table) -> range:
    """The numbers of the rows that a slice selects.

    Raises:
        InputError: the slice needs to know how many rows there are, which a stream does not say.
    """
    if selected.drawn is not None:
        raise InputError(f"{table.where}: '{selected.text}' cannot be drawn from rows; give a slice, or use data.root")
    if table.total is not None:
        found = selected.chosen(table.total, table.where, "rows")
        assert isinstance(found, range)
        return found
    bounds = (selected.start, selected.stop)
    if any(bound is not None and (bound.endswith("%") or bound.startswith("-")) for bound in bounds):
        raise InputError(
            f"{table.where}: how many rows it has is not known while they are streamed, as '{selected.text}' needs; "
            "give numbers of rows, or set data.streaming=false"
        )
    start, stop = int(selected.start or 0), int(selected.stop) if selected.stop else 2**62
    return range(start, max(start, stop))[: selected.max_samples]


def _refuse_unknown(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in known:
            near = suggest(name, known)
            raise InputError(f"{where} has no column '{name}', only {', '.join(known)}; set data.columns{near}")


# --- a folder of parquet files --------------------------------------------------------------------------


class ParquetTable:
    """Rows of a split's files, one after the other."""

    def __init__(self, files: Sequence[Path], where: str) -> None:
        parquet = _import("pyarrow.parquet", "pyarrow")
        self.where = where
        try:
            self.files = [parquet.ParquetFile(path) for path in files]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{where}: its parquet files cannot be read ({_line(error)}); fetch them again") from error
        self.total: int | None = sum(file.metadata.num_rows for file in self.files)
        self.columns: Sequence[str] | None = self.files[0].schema_arrow.names

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        assert self.columns is not None
        _refuse_unknown(columns, self.columns, self.where)
        first = 0  # number of the file's or batch's first row
        for file in self.files:
            if first + file.metadata.num_rows <= chosen.start or first >= chosen.stop:
                first += file.metadata.num_rows
                continue
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=list(columns)):
                mine = range(max(chosen.start, first), min(chosen.stop, first + len(batch)))
                if mine:
                    yield from batch.slice(mine.start - first, len(mine)).to_pylist()
                first += len(batch)
                if first >= chosen.stop:
                    return


def _local_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of each split: `validation-00000-of-00068.parquet`, `validation.parquet`, `validation/0000.parquet`."""
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
        raise InputError(f"{inside} holds no .parquet file; set data.hub to a folder with them, or to a hub id.")
    for name, paths in splits.items():
        folders = sorted({path.parent.relative_to(folder).as_posix() for path in paths})
        if len(folders) > 1:
            raise InputError(
                f"{folder} has files of {name} in {' and '.join(folders)}; set data.hub_config to one of them"
            )
    return dict(splits)


# --- the hub --------------------------------------------------------------------------------------------


class HubTable:
    """Rows of a split of the hub's, pictures as the bytes of their files."""

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
        self.total: int | None = (known.num_examples or None) if streaming and known else None
        if not streaming:
            self.total = len(self.data)

    def rows(self, chosen: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        if self.columns is not None:
            _refuse_unknown(columns, self.columns, self.where)
        data = self.data.select_columns(list(columns))
        for name, feature in (data.features or {}).items():
            if isinstance(feature, self.datasets.Image):
                data = data.cast_column(name, self.datasets.Image(decode=False))
        try:
            if self.streaming:
                yield from itertools.islice(data.skip(chosen.start), len(chosen))
            else:
                yield from data.select(chosen)
        except self.failures as error:
            raise _unavailable(self.hub, error) from error


def _hub_splits(hub: str, config: str | None) -> dict[str, list[Path]]:
    """The names of a data set's splits (their files are `datasets`' business)."""
    datasets = _datasets()
    try:
        with hub_or_cache(hub):
            return {name: [] for name in datasets.get_dataset_split_names(hub, config)}
    except FAILURES as error:
        raise _unavailable(hub, error) from error


def _datasets() -> ModuleType:
    """The library, which runs no loading script: its version 3 would ask at the terminal whether to."""
    datasets = _import("datasets", "datasets")
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    return datasets


def _unavailable(hub: str, error: Exception) -> InputError:
    """The sentence for a data set that `datasets` does not load."""
    said = _line(error)
    if any(words in said for words in ("scripts are no longer supported", "custom code", "dataset script")):
        other = PARQUET_FORM.get(hub)
        form = f"data.hub={other}" if other else "data.hub to the data set's parquet form"
        return InputError(f"{hub} is a loading script, which is not run; set {form}")
    return InputError(
        f"the data set {hub} cannot be read from the hub{when_offline()} ({said}); check data.hub, data.hub_config "
        "and the network, and for a gated data set accept its terms and set HF_TOKEN"
    )


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"data.hub needs the package {package}; install it: pip install 'vlmvqa[hub]'") from None


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
