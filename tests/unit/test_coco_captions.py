"""Reader of COCO captions' official files and Karpathy's: examples, errors, synthetic files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.configs import data as train_data
from tests.unit.test_vqav2 import change, ids, save
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import coco_captions
from vlmvqa.data.example import Question
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.synthetic import coco_captions as synthetic_coco_captions
from vlmvqa.extras.synthetic import scene as scenes

VAL = "captions_val2017.json"
CAPTIONS = {9: ["A cat. ", "a  cat\non a mat", "Cats"], 7: ["A dog.", "Dog"], 8: ["Ein Bär"]}
# image: folder of 2014, Karpathy's split
KARPATHY = {9: ("train2014", "train"), 7: ("val2014", "restval"), 8: ("val2014", "val"), 5: ("val2014", "test")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    images = [{"id": key, "file_name": f"{key:012d}.jpg", "license": 3} for key in CAPTIONS]
    # The file has the captions of an image in any order.
    pairs = [(key, text) for place in range(3) for key, texts in CAPTIONS.items() for text in texts[place : place + 1]]
    annotations = [{"image_id": key, "id": 100 + n, "caption": text} for n, (key, text) in enumerate(pairs)]
    (tmp_path / "annotations").mkdir()
    for name in (VAL, "captions_train2017.json"):
        save(tmp_path / "annotations" / name, {"images": images, "annotations": annotations})
    karpathy = [
        {
            "filepath": folder,
            "filename": f"COCO_{folder}_{key:012d}.jpg",
            "cocoid": key,
            "imgid": n,
            "split": split,
            "sentids": [n],
            "sentences": [{"raw": text, "tokens": ["x"], "imgid": n, "sentid": n} for text in CAPTIONS.get(key, ["x"])],
        }
        for n, (key, (folder, split)) in enumerate(KARPATHY.items())
    ]
    save(tmp_path / "dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    for folder, names in {
        **{folder: [f"{key:012d}.jpg" for key in CAPTIONS] for folder in ("train2017", "val2017")},
        **{folder: [f"COCO_{folder}_{key:012d}.jpg" for key in KARPATHY] for folder in ("train2014", "val2014")},
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    return tmp_path


# --- what is read -------------------------------------------------------------------------------------


def test_to_evaluate_an_image_is_one_question_with_all_captions_as_they_are(root: Path) -> None:
    examples = coco_captions.read(root, "val2017")
    assert ids(examples) == [9, 7, 8] == [example.image_id for example in examples]
    assert examples[0].image == root / "val2017" / "000000000009.jpg"
    captions = ("A cat. ", "a  cat\non a mat", "Cats")
    assert examples[0].questions == (Question(9, "", "caption en\n", "A cat.", captions),)


def test_to_train_each_caption_is_a_question_that_shares_the_image(root: Path) -> None:
    first, *_ = coco_captions.read(root, "train2017")
    assert [question.target for question in first.questions] == ["A cat.", "a cat on a mat", "Cats"]
    assert ids([first]) == ["9-0", "9-1", "9-2"]
    assert {question.prompt for question in first.questions} == {"caption en\n"}
    assert [question.answers for question in first.questions] == [("A cat.",), ("a cat on a mat",), ("Cats",)]


def test_the_form_may_be_chosen(root: Path) -> None:
    assert len(ids(coco_captions.read(root, "val2017", captions="each"))) == 6
    assert len(ids(coco_captions.read(root, "train2017", captions="one"))) == 3
    with pytest.raises(InputError, match=r"captions=ech is unknown; use one of each, one; did you mean 'each'"):
        coco_captions.read(root, "val2017", captions="ech")


def test_karpathys_train_split_has_restval(root: Path) -> None:
    examples = coco_captions.read(root, "karpathy_train", captions="one")
    assert [example.image for example in examples] == [
        root / "train2014" / "COCO_train2014_000000000009.jpg",
        root / "val2014" / "COCO_val2014_000000000007.jpg",
    ]
    assert examples[1].questions[0].answers == ("A dog.", "Dog")
    assert ids(coco_captions.read(root, "karpathy_val")) == [8]
    assert ids(coco_captions.read(root, "karpathy_test")) == [5]
    assert ids(coco_captions.read(root, "karpathy_train")) == ["9-0", "9-1", "9-2", "7-0", "7-1"]


def test_slices_and_samples_count_images(root: Path) -> None:
    assert ids(coco_captions.read(root, "val2017[1:]")) == [7, 8]
    assert ids(coco_captions.read(root, "train2017[:34%]")) == ["9-0", "9-1", "9-2"]
    assert ids(coco_captions.read(root, "karpathy_train", max_samples=1)) == ["9-0", "9-1", "9-2"]
    with pytest.raises(InputError, match="reaches beyond its 3 images"):
        coco_captions.read(root, "val2017[:4]")


def test_the_files_may_lie_in_either_folder(root: Path) -> None:
    assert coco_captions.files(root, "karpathy_val") == [root / "dataset_coco.json", root / "val2014"]
    (root / "annotations" / VAL).rename(root / VAL)
    assert coco_captions.files(root, "val2017") == [root / VAL, root / "val2017"]


def test_a_prompt_has_no_place_for_a_question(root: Path) -> None:
    with pytest.raises(InputError, match=r"\{question\}, but captions have none"):
        coco_captions.read(root, "val2017", prompt="answer en {question}\n")
    assert train_data("data=coco_captions", "data.root=x").prompt == "caption en\n"
    with pytest.raises(InputError, match="must hold no braces: coco_captions asks nothing"):
        train_data("data=coco_captions", "data.root=x", "data.prompt='{question}'")
    with pytest.raises(InputError, match=r"must hold \{question\} once"):
        train_data("data=gqa", "data.root=x", "data.prompt=answer")


# --- what cannot be read --------------------------------------------------------------------------------


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(InputError, match=r"has no annotations/captions_val2014.json; COCO captions expects annot"):
        coco_captions.read(root, "val2014")
    with pytest.raises(InputError, match=r"COCO captions has no split 'val', only train2014, .*; did you mean 'val20"):
        coco_captions.read(root, "val")
    (root / "train2014").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"has no train2014; COCO captions expects dataset_coco.json, train2014 and"):
        coco_captions.read(root, "karpathy_train")


@pytest.mark.parametrize(("split", "name"), [("val2017", f"annotations/{VAL}"), ("karpathy_val", "dataset_coco.json")])
def test_broken_json_is_located_by_line_and_column(root: Path, split: str, name: str) -> None:
    (root / name).write_text('{"images":\n [}')
    with pytest.raises(InputError, match=f"{name}, line 2, column \\d+: broken JSON"):
        coco_captions.read(root, split)
    save(root / name, {"image": []})
    with pytest.raises(InputError, match=f"{name} holds no list 'images'; is it"):
        coco_captions.read(root, split)


def edit(key: str, number: int, **changes: Any) -> Callable[[Any], None]:
    """Change a record of a list; a value of `...` removes the key."""

    def apply(content: Any) -> None:
        for name, value in changes.items():
            if value is ...:
                del content[key][number][name]
            else:
                content[key][number][name] = value

    return apply


# Image 7 is the second; its captions are annotations 101 and 104.
OFFICIAL: dict[str, tuple[Callable[[Any], None], str]] = {
    "no image id": (edit("images", 1, id=...), "image number 1: it has no 'id'"),
    "image id used twice": (edit("images", 1, id=9), "image 9: its id is used twice"),
    "no file name": (edit("images", 1, file_name=...), "image 7: it has no 'file_name'"),
    "missing image": (edit("images", 1, file_name="x.jpg"), "val2017/x.jpg is missing (1 of the 3 images are)"),
    "empty caption": (edit("annotations", 1, caption=" \n"), "annotation 101: the caption is empty"),
    "caption of wrong type": (edit("annotations", 1, caption=3), "annotation 101: its 'caption' should be text, not 3"),
    "caption id used twice": (edit("annotations", 1, id=100), "annotation 100: its id is used twice"),
    "caption of no image": (edit("annotations", 1, image_id=77), "image 77: it has captions, but is not among"),
    "caption is no object": (lambda content: content["annotations"].__setitem__(1, 3), "annotation number 1: a JSON"),
    "no captions": (
        lambda content: content.update(annotations=[one for one in content["annotations"] if one["image_id"] != 7]),
        "image 7: it has no caption",
    ),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_a_bad_record_stops_the_run_or_is_left_out(root: Path, case: str) -> None:
    spoil, problem = OFFICIAL[case]
    path = root / "annotations" / VAL
    change(path, spoil)
    with pytest.raises(InputError) as caught:
        coco_captions.read(root, "val2017")
    assert str(caught.value).startswith(str(path)) and problem in str(caught.value)
    assert "data.on_bad_record=skip" in str(caught.value)
    bad_records = BadRecords("skip")
    assert {9, 8} <= set(ids(coco_captions.read(root, "val2017", bad_records=bad_records)))
    assert any(problem in record for record in bad_records.seen)


KARPATHYS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no id": (edit("images", 1, cocoid=...), "image number 1: it has no 'cocoid'"),
    "id used twice": (edit("images", 1, cocoid=9), "image 9: its cocoid is used twice"),
    "no split": (edit("images", 1, split=...), "image 7: it has no 'split'"),
    "no sentences": (edit("images", 1, sentences=[]), "image 7: it has no caption"),
    "empty sentence": (edit("images", 1, sentences=[{"raw": " "}]), "7: one of its sentences has no text in 'raw'"),
    "sentence of wrong type": (edit("images", 1, sentences=[{"raw": 3}]), "one of its sentences has no text in 'raw'"),
    "missing image": (edit("images", 1, filename="x.jpg"), "val2014/x.jpg is missing (1 of the 2 images are)"),
}


@pytest.mark.parametrize("case", KARPATHYS)
def test_a_bad_record_of_karpathys_stops_the_run_or_is_left_out(root: Path, case: str) -> None:
    spoil, problem = KARPATHYS[case]
    change(root / "dataset_coco.json", spoil)
    with pytest.raises(InputError) as caught:
        coco_captions.read(root, "karpathy_train")
    assert problem in str(caught.value) and "data.on_bad_record=skip" in str(caught.value)
    bad_records = BadRecords("skip")
    assert ids(coco_captions.read(root, "karpathy_train", bad_records=bad_records)) == ["9-0", "9-1", "9-2"]
    assert len(bad_records.seen) == 1


# --- the results file -----------------------------------------------------------------------------------


def test_the_results_file_has_image_ids_and_raw_captions(tmp_path: Path) -> None:
    captions: dict[int | str, str] = {9: "A cat. ", "7": "", "COCO_val2014_000000391895.jpg": "a man", "9-0": "each"}
    coco_captions.write_submission(tmp_path / "captions.json", captions)
    assert json.loads((tmp_path / "captions.json").read_text()) == [
        {"image_id": 9, "caption": "A cat. "},
        {"image_id": 7, "caption": ""},
        {"image_id": 391895, "caption": "a man"},
        {"image_id": "9-0", "caption": "each"},
    ]


# --- drawn scenes ---------------------------------------------------------------------------------------


def test_captions_count_what_a_scene_holds() -> None:
    looks = [("circle", "red"), ("square", "blue"), ("square", "blue"), ("star", "black")]
    scene = [scenes.Shape(form, color, "small", 0.2) for form, color in looks]
    assert synthetic_coco_captions.describe(scene) == [
        "a red circle, two blue squares and a black star",
        "there are a red circle, two blue squares and a black star",
        "a picture of a red circle, two blue squares and a black star",
        "a red circle, two blue squares and a black star on a light background",
        "a black star, two blue squares and a red circle in a picture",
    ]
    assert synthetic_coco_captions.describe(scene[:1])[1] == "there is a red circle"


def test_drawn_captions_are_read_by_the_official_reader(tmp_path: Path) -> None:
    settings = DataSettings(
        "coco_captions",
        str(tmp_path / "drawn"),
        {"train_images": 5, "val_images": 4, "captions": None},
        synthetic=True,
        prompt="caption en\n",
    )
    counts = {}
    for split in ("train2014", "val2014", "karpathy_train", "karpathy_val", "karpathy_test"):
        examples = read_examples(settings, split, None, BadRecords())
        counts[split] = len(ids(examples))
    assert counts == {"train2014": 25, "val2014": 4, "karpathy_train": 25, "karpathy_val": 2, "karpathy_test": 2}
    official = {one.image_id: one.questions for one in coco_captions.read(tmp_path / "drawn", "val2014")}
    for example in coco_captions.read(tmp_path / "drawn", "karpathy_val"):
        assert official[example.image_id] == example.questions and len(example.questions[0].answers) == 5
