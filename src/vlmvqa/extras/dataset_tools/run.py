"""The jobs of launch/prepare.py: download, check and pack a dataset, cache features, write files for harnesses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmvqa import ranks
from vlmvqa.config.schema import AnyModelSettings, DataSettings, RunSettings
from vlmvqa.data.example import Example, count_questions
from vlmvqa.data.processor import Processor
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError, counted
from vlmvqa.extras.dataset_tools import harness
from vlmvqa.extras.dataset_tools.check import check, table
from vlmvqa.extras.dataset_tools.download import download
from vlmvqa.extras.feature_cache.store import check_dtype, feature_key
from vlmvqa.extras.feature_cache.writer import disk_space, unique_images, write
from vlmvqa.extras.shards import shards
from vlmvqa.models import checkpoint
from vlmvqa.models.build import build_vision_encoder
from vlmvqa.models.interface import DTYPES, GenerationSettings
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.models.vlm import ModelSettings

MOST_WORKERS = 8


@dataclass(frozen=True)
class FeatureSettings:
    """The `features` group; conf/prepare.yaml documents its keys."""

    dir: str
    dtype: str = "bfloat16"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)


@dataclass(frozen=True)
class PackSettings:
    """The `pack` group: the folder of the shards."""

    dir: str


@dataclass(frozen=True)
class CheckSettings:
    """The `check` group: whether images are decoded, and the folder of `problems.txt`."""

    dir: str
    images: bool = False


@dataclass(frozen=True)
class HarnessSettings:
    """The `harness` group: the harness whose files are written, and their folder."""

    format: str
    dir: str


@dataclass(frozen=True)
class PrepareConfig:
    """Config of launch/prepare.py: a job and its settings; conf/prepare.yaml documents its keys."""

    job: str
    run: RunSettings
    data: DataSettings
    model: AnyModelSettings
    decoding: GenerationSettings
    features: FeatureSettings
    pack: PackSettings
    check: CheckSettings
    harness: HarnessSettings
    split: str = "train"
    seed: int = 0
    batch_size: int = 64
    workers: int | None = None
    given: frozenset[str] = frozenset()


def run_job(config: PrepareConfig) -> None:
    """Run the job that the first word of the command names."""
    job, what = JOBS[config.job]
    if ranks.world_size() > 1:
        raise InputError(f"{what} by one process; start it with python, without a launcher")
    job(config)


def cache_features(config: PrepareConfig) -> None:
    """Cache the encoder's output for every image of a split."""
    folder, data = config.run.folder, config.data.single
    bad_records = BadRecords(data.on_bad_record)
    examples = read_examples(data, config.split, _most_samples(config), bad_records)
    vision, processor = build_encoder(config, data, examples)
    if processor.images.tiles is not None or processor.images.resize == "letterbox":
        raise InputError("features are those of images of one shape; leave data.tiles and data.resize=letterbox out")
    key = feature_key(vision, processor.images, config.features.dtype)
    shape = vision.features.tokens, vision.features.width
    print(disk_space(folder, len(unique_images(examples)), shape, config.features.dtype), flush=True)
    cores = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    try:
        store = write(
            folder,
            key,
            vision,
            examples,
            processor.load_images,
            bad_records,
            batch_size=config.batch_size,
            workers=cores if config.workers is None else config.workers,
            overwrite=config.features.overwrite,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory is full at batch_size={config.batch_size}; make it smaller") from error
    print(f"{counted(len(store), 'image')}; train on them with data.feature_cache={folder} trainable.vision=none")
    listing = folder / "skipped.jsonl"
    listing.unlink(missing_ok=True)  # the records that an earlier command skipped are counted again
    bad_records.list_in(listing)
    if bad_records.seen:
        print(f"{counted(len(bad_records.seen), 'bad record')} left out, listed in {listing}")


def build_encoder(
    config: PrepareConfig, data: DataSettings, examples: Sequence[Example]
) -> tuple[VisionEncoder, Processor]:
    """Return the encoder with the weights that launch/train.py will give it, and the processor of its input."""
    if not isinstance(config.model, ModelSettings):
        raise InputError(f"features are cached for models of the family vlm, not {config.model.family}")
    if config.model.dtype not in DTYPES:
        raise InputError(f"model.dtype={config.model.dtype} is unknown; use one of {', '.join(DTYPES)}")
    torch.manual_seed(config.seed)
    vision = build_vision_encoder(config.model.vision)  # the first weights that a run initialises
    for parameter in vision.parameters():
        parameter.data = parameter.data.to(DTYPES[config.model.dtype])
    processor = checkpoint.family(config.model.family).compose_processor(config.model, data, examples)
    return vision.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def check_data(config: PrepareConfig) -> None:
    """Count every split's questions and images, and list the records that cannot be used."""
    data = config.data.single
    splits: Mapping[str, Mapping[str, int]] = data.expected_counts
    if not splits or data.synthetic or data.hub is not None:  # generated, or with splits of other names
        splits = {data.train_split: {}, data.eval_split: {}}

    def read(split: str, bad_records: BadRecords) -> list[Example]:
        return read_examples(data, split, None, bad_records)

    found = list(check(read, splits, config.check.images))
    print(table(found))
    problems = [f"{one.split}: {problem}" for one in found for problem in one.problems]
    if problems:
        folder = Path(config.check.dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "problems.txt").write_text("\n".join(problems) + "\n", encoding="utf-8")
        print(f"{counted(len(problems), 'problem')}, the first: {problems[0]}\nall of them: {folder / 'problems.txt'}")
    if not all(one.complete for one in found):
        sys.exit(1)


def pack(config: PrepareConfig) -> None:
    """Write a split as parquet shards."""
    data = config.data.single
    if data.shards is not None:
        raise InputError("data.shards is already packed; give data.root or data.hub")
    folder, most = Path(config.pack.dir).expanduser(), _most_samples(config)
    bad_records = BadRecords(data.on_bad_record)
    examples = read_examples(data, config.split, most, bad_records)
    written = shards.write(folder, shards.packing_key(data, config.split, most), examples, bad_records)
    print(f"{counted(written, 'image')} with all questions; train on them with data.shards={folder}")
    if bad_records.seen:
        print(f"{counted(len(bad_records.seen), 'bad record')} left out, the first: {bad_records.seen[0]}")


def write_harness_files(config: PrepareConfig) -> None:
    """Write the files by which an evaluation harness reads the evaluation split, or another."""
    data = config.data.single
    split = config.split if "split" in config.given else data.eval_split
    bad_records = BadRecords(data.on_bad_record)
    examples = read_examples(data, split, data.max_eval_samples, bad_records)
    folder = Path(config.harness.dir).expanduser()
    name = harness.write(config.harness.format, folder, data, split, examples, bad_records)
    print(f"{name}: {counted(count_questions(examples), 'question')} in {folder}; docs/harnesses.md runs it")
    if bad_records.seen:
        print(f"{counted(len(bad_records.seen), 'bad record')} left out, the first: {bad_records.seen[0]}")


def download_archives(config: PrepareConfig) -> None:
    """Download and unpack the benchmark's official archives."""
    data = config.data.single
    if not data.archives:
        raise InputError(
            f"data={data.source} has no archives for public download; conf/data/{data.source}.yaml explains why"
        )
    root = Path(data.root or ".").expanduser()
    for one in data.archives:
        fetched = download(root, **one)
        print(f"{one['url']}: {'unpacked' if fetched else 'already present'}", flush=True)
    print(f"all in {root}; check it with: python launch/prepare.py check data={data.source} data.root={root}")


def _most_samples(config: PrepareConfig) -> int | None:
    data = config.data
    return data.max_eval_samples if config.split == data.eval_split else data.max_train_samples


JOBS: dict[str, tuple[Callable[[PrepareConfig], None], str]] = {
    "download": (download_archives, "archives are downloaded"),
    "check": (check_data, "a dataset is checked"),
    "pack": (pack, "a split is packed"),
    "features": (cache_features, "features are computed"),
    "harness": (write_harness_files, "a harness's files are written"),
}
