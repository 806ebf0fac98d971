"""Make what training reads, before it trains.

python launch/prepare.py download data=gqa data.root=/data/gqa
python launch/prepare.py check data=gqa data.root=/data/gqa
python launch/prepare.py pack data=vqav2 data.root=/data/vqav2 split=train
python launch/prepare.py features model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2

download    the benchmark's official archives, fetched and unpacked
check       what a data set holds beside what was published, and every record that cannot be used
pack        a split in a few large files, for disks that are slow with many small ones
features    the vision encoder's output, once for every image, for training with a frozen encoder

The first word says what is made; with -h after it, what that is and what can be set.
"""

from __future__ import annotations

import usage  # first: it answers -h without PyTorch

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

import from_config
from vlmvqa import ranks
from vlmvqa.cli import group, run
from vlmvqa.config.early_checks import prepare_job
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.data.processor import Processor
from vlmvqa.data.tasks import DataSettings, one_task, packing_key, read_examples
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.dataset_tools.check import Published, check, table
from vlmvqa.extras.dataset_tools.download import Archive, prepare
from vlmvqa.extras.feature_cache.forecast import forecast
from vlmvqa.extras.feature_cache.store import FeatureKey, check_dtype
from vlmvqa.extras.feature_cache.writer import WriteOptions, unique_images, write
from vlmvqa.extras.shards import shards
from vlmvqa.inference import build
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.models.vlm import DTYPES
from vlmvqa.settings import build_settings

MOST_WORKERS = 8


@dataclass(frozen=True)
class FeatureSettings:
    """The `features` node; its keys are explained in conf/prepare.yaml."""

    dir: str
    dtype: str = "bfloat16"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)


def features(config: DictConfig) -> None:
    """The encoder's output for every image of a split."""
    _refuse_ranks("features are made")
    settings = build_settings(FeatureSettings, group(config, "features"), "features")
    folder = from_config.run_folder(config)
    data = one_task(config)
    bad_records = BadRecords(data.on_bad_record)
    most = data.max_eval_samples if config.split == data.eval_split else data.max_train_samples
    examples = read_examples(data, config.split, most, bad_records)
    vision, processor = build_encoder(config, data, examples)
    key = FeatureKey.of(vision, processor.images, settings.dtype)
    space = forecast(folder, len(unique_images(examples)), (vision.tokens, vision.width), settings.dtype)
    print(space, flush=True)
    space.refuse()
    options = WriteOptions(
        batch_size=config.batch_size,
        workers=min(MOST_WORKERS, len(os.sched_getaffinity(0))) if config.workers is None else config.workers,
        overwrite=settings.overwrite,
        progress=True,
    )
    try:
        store = write(folder, key, vision, examples, processor.image, bad_records, options)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory is full at batch_size={config.batch_size}; make it smaller") from error
    print(f"{counted(len(store), 'image')}; train on them with data.feature_cache={folder} trainable.vision=none")
    listing = folder / "skipped.jsonl"
    listing.unlink(missing_ok=True)  # what an earlier command left out is counted again by this one
    bad_records.list_in(listing)
    if bad_records.seen:
        print(f"{counted(len(bad_records.seen), 'bad record')} left out, listed in {listing}")


def build_encoder(
    config: DictConfig, data: DataSettings, examples: Sequence[Example]
) -> tuple[VisionEncoder, Processor]:
    """The encoder with the weights that `launch/train.py` will give it, and the processor that makes its input."""
    model = group(config, "model")
    torch.manual_seed(config.seed)
    vision = VisionEncoder(build_settings(VisionSettings, model["vision"], "model.vision"))  # what a run draws first
    if model["dtype"] not in DTYPES:
        raise InputError(f"model.dtype={model['dtype']} is unknown; use one of {', '.join(DTYPES)}")
    for parameter in vision.parameters():
        parameter.data = parameter.data.to(DTYPES[model["dtype"]])
    with open_dict(config), torch.device("meta"):  # the language model is not needed: no weights of it are read
        config.model.vision.weights = config.model.language.weights = "random"
        processor = build.build_predictor(config, data, examples).processor
    return vision.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def check_data(config: DictConfig) -> None:
    """Every split's counts and problems."""
    data = one_task(config)
    _refuse_ranks("a data set is looked through")
    splits = {name: Published(**of) for name, of in data.expected_counts.items()}
    if not splits or data.synthetic or data.hub is not None:  # as large as it was drawn; splits of other names
        splits = {data.train_split: Published(), data.eval_split: Published()}

    def read(split: str, bad_records: BadRecords) -> list[Example]:
        return read_examples(data, split, None, bad_records)

    found = list(check(read, splits, config.check.pictures))
    print(table(found))
    problems = [f"{one.split}: {problem}" for one in found for problem in one.problems]
    if problems:
        folder = Path(config.check.dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "problems.txt").write_text("\n".join(problems) + "\n", encoding="utf-8")
        print(f"{counted(len(problems), 'problem')}, the first: {problems[0]}\nall of them: {folder / 'problems.txt'}")
    if not all(one.complete for one in found):
        sys.exit(1)


def pack(config: DictConfig) -> None:
    """A split in large files."""
    _refuse_ranks("a split is packed")
    data = one_task(config)
    if data.shards is not None:
        raise InputError("data.shards is packed already; give data.root or data.hub")
    folder, bad_records = Path(config.pack.dir).expanduser(), BadRecords(data.on_bad_record)
    most = data.max_eval_samples if config.split == data.eval_split else data.max_train_samples
    examples = read_examples(data, config.split, most, bad_records)
    written = shards.write(folder, packing_key(data, config.split, most), examples, bad_records, progress=True)
    print(f"{counted(written, 'image')} with all questions; train on them with data.shards={folder}")
    if bad_records.seen:
        print(f"{counted(len(bad_records.seen), 'bad record')} left out, the first: {bad_records.seen[0]}")


def download(config: DictConfig) -> None:
    """The benchmark's official archives."""
    _refuse_ranks("archives are fetched")
    data = one_task(config)
    if not data.archives:
        raise InputError(
            f"data={data.source} has no archives that anyone may fetch; conf/data/{data.source}.yaml says why"
        )
    root = Path(data.root or ".").expanduser()
    for one in data.archives:
        fetched = prepare(Archive(**one), root)
        print(f"{one['url']}: {'unpacked' if fetched else 'was there'}", flush=True)
    print(f"all in {root}; look at it with: python launch/prepare.py check data={data.source} data.root={root}")


def _refuse_ranks(what: str) -> None:
    if ranks.world_size() > 1:
        raise InputError(f"{what} by one process; start it with python, without a launcher")


JOBS: dict[str, Callable[[DictConfig], None]] = {
    "download": download,
    "check": check_data,
    "pack": pack,
    "features": features,
}


def start() -> None:
    """Take the job's word off the command line, which is Hydra's from there on."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith(usage.ASKING):  # what can be set is the same for all jobs
        run(features, "prepare")
        return
    try:
        word = prepare_job(arguments)
    except InputError as error:
        sys.exit(f"error: {error}")
    sys.argv[1:] = arguments[1:]
    run(JOBS[word], "prepare")


if __name__ == "__main__":
    start()
