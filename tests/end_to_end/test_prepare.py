"""`launch/prepare.py`: features that a training run accepts, packed splits, and dataset checks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from tests.configs import train_config
from tests.end_to_end import scripts
from tests.end_to_end.scripts import Ended, done, launch, sentence
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords
from vlmvqa.extras.feature_cache.store import FeatureStore
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.models.trained_model import TrainedModel, build_model

SMALL = (
    "data.options.train_images=30",
    "data.options.val_images=6",
    "data.options.questions_per_image=3",
    "model.vision.overrides.depth=1",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return synthetic_vqav2.write(folder, train_images=30, val_images=6, questions_per_image=3)


def call(*arguments: str) -> Ended:
    """Run the script in this process, which saves seconds of imports."""
    return scripts.call("prepare", *arguments)


def in_training(root: Path, *overrides: str) -> tuple[TrainedModel, list[Example]]:
    """The model as launch/train.py builds it, and its training images."""
    config = train_config(f"data.root={root}", "run.name=x", *SMALL, *overrides)
    set_seed(config.seed)
    data = config.data
    examples = read_examples(data, data.train_split, data.max_train_samples, BadRecords())
    return build_model(config.model, data, config.decoding, examples), examples


def test_features_are_accepted_by_the_training_run(root: Path, tmp_path: Path) -> None:
    """The second call has nothing left to compute. Half of the images by `data.train_split`, with another seed."""
    asked = ("seed=3", "data.train_split=train[:50%]", "data.resize=center_crop")
    arguments = (*SMALL, *asked, f"data.root={root}", f"features.dir={tmp_path}", "features.dtype=float32", "workers=1")
    first = done(launch("prepare", "features", *arguments, "batch_size=8"))
    size = first.out.splitlines()[0]
    predictor, examples = in_training(root, *asked)
    assert f"{len(examples)} images of 10 tokens x 128 numbers in float32, 5.12kB each" in size and "free" in size
    assert "\r" not in first.err and "encoding" not in first.err  # no bar where there is no terminal
    assert f"data.feature_cache={tmp_path} trainable.vision=none" in first.out

    vision = predictor.model.vision.eval()
    store = FeatureStore.open(tmp_path, vision, predictor.processor.images, examples)
    assert len(store) == len(examples) < 30
    with torch.no_grad():
        batch = torch.stack([predictor.processor.load_images(example).images[0] for example in examples[:8]])
        assert torch.equal(torch.stack([store[example.image_id] for example in examples[:8]]), vision(batch))
    written = (tmp_path / "features.bin").stat().st_mtime_ns
    again = done(call("features", *arguments))
    assert "of them already present" in again.out
    assert (tmp_path / "features.bin").stat().st_mtime_ns == written
    other = sentence(call("features", *arguments, "seed=4"))
    assert "has other features: the encoder's weights differ" in other


def test_a_bad_image_from_the_command_line(root: Path, tmp_path: Path) -> None:
    root, folder = shutil.copytree(root, tmp_path / "data"), tmp_path / "features"
    bad = sorted((root / "train2014").iterdir())[4]
    bad.write_bytes(b"no picture")
    arguments = ("features", *SMALL, f"data.root={root}", f"features.dir={folder}", "workers=0")
    said = sentence(call(*arguments))
    assert bad.name in said and "data.on_bad_record=skip" in said
    skipped = done(call(*arguments, "data.on_bad_record=skip"))
    assert "29 images; " in skipped.out and "1 bad record left out" in skipped.out
    (record,) = (folder / "skipped.jsonl").read_text().splitlines()
    assert bad.name in json.loads(record)["record"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["featurs"],
            "unknown job 'featurs'; its first word is one of download, check, pack, features, harness; "
            "did you mean 'features'?",
        ),
        ([], "no job given; its first word is one of download, check, pack, features"),
        (["data=shapes", "features"], "no job given"),
        (["features", "chek"], "'chek' is not a setting; give settings as key=value"),
        (["features", "features.dri=x"], "did you mean 'features.dir=x'"),
        (["features", "model=tinny"], "did you mean 'tiny'"),
        (["features", "features.dtype=bfloat61"], "did you mean 'bfloat16'"),
        (["features", "batch_size=0"], "batch_size=0"),
        (["features", "model.dtype=float61"], "model.dtype=float61 is unknown"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], said: str, root: Path, tmp_path: Path) -> None:
    if arguments[:1] == ["features"] and "=" in arguments[1]:
        arguments = [*arguments, *SMALL, f"data.root={root}"]
        arguments += [] if "dri" in arguments[1] else [f"features.dir={tmp_path}"]
    assert said in sentence(call(*arguments))


def test_help_lists_the_jobs_and_when_features_pay() -> None:
    assert "features    cache the vision encoder's output" in done(launch("prepare", "-h")).out
    said = done(launch("prepare", "features", "-h")).out
    for part in ("It pays off", "It cannot be used", "395 kB", "33 GB", "on_bad_record"):
        assert part in said


# --- pack and check -----------------------------------------------------------------------------------


def test_a_packed_split_trains_as_its_files_do(root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        said = done(
            call("pack", "data=vqav2", f"data.root={root}", f"split={split}", f"pack.dir={tmp_path / 'packed'}")
        )
        assert f"data.shards={tmp_path / 'packed'}" in said.out
    ways = {"files": f"data.root={root}", "packed": f"data.shards={tmp_path / 'packed'}"}
    for name, way in ways.items():
        done(scripts.call("train", "data=vqav2", way, f"run.dir={tmp_path / name}", *scripts.SMALL))
    assert scripts.losses(tmp_path / "files") == scripts.losses(tmp_path / "packed")
    assert scripts.metrics(tmp_path / "files")["metrics"] == scripts.metrics(tmp_path / "packed")["metrics"]
    other = scripts.call(
        "train", "data=vqav2", ways["packed"], "data.train_split=train[:50%]", f"run.dir={tmp_path / 'o'}"
    )
    assert "has no shards of train[:50%]; create them with: python launch/prepare.py pack" in sentence(other)


def test_check_counts_and_names_what_is_missing(root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(root, tmp_path / "data")
    arguments = ("check", "data=vqav2", "data.synthetic=true", f"data.root={root}", f"check.dir={tmp_path}")
    options = "data.options={train_images:30,val_images:6,questions_per_image:3}"
    assert "train" in done(call(*arguments, options, "check.images=true")).out
    broken, gone = sorted((root / "train2014").iterdir())[2:4]
    broken.write_bytes(broken.read_bytes()[:300])
    gone.unlink()
    ended = call(*arguments, options, "check.images=true")
    assert ended.status == 1 and "incomplete" in ended.out
    problems = (tmp_path / "problems.txt").read_text()
    assert broken.name in problems and gone.name in problems
    real = call("check", "data=vqav2", f"data.root={root}", f"check.dir={tmp_path}")
    assert real.status == 1 and "443,757" in real.out  # the published size


def test_a_harness_reads_the_evaluation_split_or_another(root: Path, tmp_path: Path) -> None:
    """Bad images are left out of both formats; the questions keep their order."""
    root, folder = shutil.copytree(root, tmp_path / "data"), tmp_path / "harness"
    (sorted((root / "val2014").iterdir())[0]).unlink()
    given = ("harness", "data=vqav2", f"data.root={root}", f"harness.dir={folder}", "data.on_bad_record=skip")
    ended = done(call(*given))
    number = re.search(r"vlmvqa_vqav2_val: (\d+) questions", ended.out)
    assert number and "is missing" in ended.out and (folder / "vlmvqa_vqav2_val.yaml").exists()
    for split, name, count in ((), "val", int(number[1])), (("split=train[:4]",), "train_4", 4):
        done(call(*given, "harness.format=vlmevalkit", *split))
        table = (folder / f"vlmvqa_vqav2_{name}.tsv").read_text().splitlines()
        assert len(table) == 1 + count and table[0].split("\t")[:3] == ["index", "question_id", "question"]
    assert "no equivalent in lmms_eval" in sentence(call(*given, "data.metric=cider"))
