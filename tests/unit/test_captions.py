"""Caption scores equal pycocoevalcap's on its own printed scores, and our tokenizer its Java one."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import caption_scores, java
from vlmvqa.metrics.ptb_tokenizer import tokenize

GOLDEN = Path(os.environ.get("VLMVQA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "captions"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason=f"the official scores are not in {GOLDEN}; set VLMVQA_GOLDEN to the folder that holds captions/",
)
needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="pycocoevalcap or Java is not installed",
)
SETS = ("fakecap126", "human500")
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def official_scores(scores: dict[str, Any]) -> dict[str, float]:
    """Return the official scores by our names; their BLEU is one list per image."""
    bleu = scores["Bleu"] if "Bleu" in scores else [scores[f"Bleu_{n}"] for n in range(1, 5)]
    return {**{f"bleu_{n}": b for n, b in enumerate(bleu, 1)}, "rouge_l": scores["ROUGE_L"], "cider": scores["CIDEr"]}


def read_raw(name: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    predictions = {row["image_id"]: row["caption"] for row in read(f"{name}_results.json")}
    references: dict[int, list[str]] = {image: [] for image in predictions}
    for row in read(f"{name}_annotations.json")["annotations"]:
        references[row["image_id"]].append(row["caption"])
    return predictions, references


def one(caption: str, *references: str, **options: Any) -> dict[str, float]:
    """Return the scores of an image in a dataset of two whose other image shares no word with it."""
    return caption_scores({1: caption, 2: "zz"}, {1: list(references), 2: ["yy"]}, **options).per_image[1]


# --- the scorers ---------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("name", SETS)
def test_scores_what_the_official_scorers_score_on_their_tokens(name: str) -> None:
    official = read(f"{name}_official_per_image.json")
    images = official["images"]
    result = caption_scores(
        {key: image["hyp_tok"] for key, image in images.items()},
        {key: image["refs_tok"] for key, image in images.items()},
        tokenizer=str.split,
    )
    assert result.corpus == pytest.approx(official_scores(official["corpus"]), abs=1e-9)
    for key, image in images.items():
        assert result.per_image[key] == pytest.approx(official_scores(image), abs=1e-9), key


@needs_golden
def test_scores_the_published_cases() -> None:
    for case in read("cases.json")["cases"]:
        result = caption_scores(case["predictions"], case["references"], tokenizer=str.split)
        assert result.corpus == pytest.approx(official_scores(case["pycocoevalcap_1.2"]), abs=1e-9), case["name"]


def test_bleu_by_hand() -> None:
    # Three of four words, one of three pairs; the references are one shorter and one longer: the shorter counts.
    scores = one("a red red car", "a red bus", "the big red car is here", tokenizer=str.split)
    assert scores["bleu_1"] == pytest.approx(3 / 4, abs=1e-8)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3), abs=1e-8)
    # Half as long as the reference.
    assert one("a b", "a b c d")["bleu_1"] == pytest.approx(math.exp(1 - 2), abs=1e-8)


def test_bleu_of_the_set_is_of_its_sums() -> None:
    result = caption_scores({1: "a b c d", 2: "x"}, {1: ["a b c d"], 2: ["y"]}, metrics="bleu", tokenizer=str.split)
    assert list(result.corpus) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert result.corpus["bleu_1"] == pytest.approx(4 / 5, abs=1e-8)
    assert result.corpus["bleu_4"] == pytest.approx((4 / 5) ** 0.25, abs=1e-8)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequences are "a c" with both: best precision 2/3, best recall 2/2, of different references.
    expected = (1 + 1.44) * (2 / 3) * 1 / (1 + 1.44 * (2 / 3))
    assert one("a b c", "a c", "a x y z c", tokenizer=str.split)["rouge_l"] == pytest.approx(expected)
    assert one("a b", "c d", tokenizer=str.split)["rouge_l"] == 0


def test_cider_by_hand() -> None:
    """Two images without common words: all weights are log 2 and cancel."""
    assert one("a b c d", "a b c d", tokenizer=str.split)["cider"] == pytest.approx(10)
    # A word more in the caption costs a Gaussian of one; 3 of sqrt(3 * 4) single words, 2 of sqrt(2 * 3) pairs, ...
    overlap = (3 / math.sqrt(12) + 2 / math.sqrt(6) + 1 / math.sqrt(2) + 0) / 4
    assert one("a b c d", "a b c", tokenizer=str.split)["cider"] == pytest.approx(10 * overlap * math.exp(-1 / 72))
    # Repeated, counted once: (1 * 1) of (2 * 1), and no bigram matches.
    assert one("a a", "a", tokenizer=str.split)["cider"] == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))


def test_a_perfect_caption() -> None:
    perfect = one("a b c d", "a b c d", tokenizer=str.split)
    assert perfect["rouge_l"] == 1 and perfect["cider"] == pytest.approx(10)
    assert all(1 - 1e-8 < perfect[f"bleu_{n}"] < 1 for n in range(1, 5))
    # Official exceptions: under four words, and a dataset of one image, where all weights are 0.
    short = one("a b", "a b", tokenizer=str.split)
    assert short["bleu_4"] < 2e-3 and short["cider"] == pytest.approx(5)
    assert caption_scores({1: "a b c d"}, {1: ["a b c d"]}).corpus["cider"] == 0


def test_a_set_is_scored_whole() -> None:
    predictions = {1: "a red car", 2: "a blue car", 3: "a red bus", 4: "a dog"}
    references = {1: ["a red car"], 2: ["a blue bus"], 3: ["a red bus"], 4: ["a cat"]}
    halves = [
        caption_scores({n: predictions[n] for n in part}, {n: references[n] for n in part}).corpus["cider"]
        for part in ((1, 2), (3, 4))
    ]
    assert abs(caption_scores(predictions, references).corpus["cider"] - sum(halves) / 2) > 0.05


def test_captions_without_words() -> None:
    scores = one("", "a dog")
    assert all(0 <= score < 1e-9 for score in scores.values())
    assert one("a dog", ".")["cider"] == 0
    # The official scorer sees one empty word on both sides.
    assert one("", "")["rouge_l"] == 1


def test_only_what_was_asked_for() -> None:
    assert list(one("a", "a", metrics=["cider", "rouge_l"])) == ["rouge_l", "cider"]
    assert one("a", "a", metrics=[]) == {}


def test_a_tokenizer_of_ones_own() -> None:
    for letters in (list, " ".join):
        assert one("abcd", "abcd", tokenizer=letters)["cider"] == pytest.approx(10)


# --- the tokenizer -------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("name", SETS)
def test_our_tokens_are_the_official_ones(name: str) -> None:
    predictions, references = read_raw(name)
    for key, image in read(f"{name}_official_per_image.json")["images"].items():
        assert [tokenize(text) for text in references[int(key)]] == image["refs_tok"]
        assert tokenize(predictions[int(key)]) == image["hyp_tok"]


@needs_golden
@pytest.mark.parametrize("name", SETS)
def test_raw_captions_score_the_official_scores(name: str) -> None:
    result = caption_scores(*read_raw(name))
    official = official_scores(read(f"{name}_official_per_image.json")["corpus"])
    assert result.corpus["cider"] == pytest.approx(official["cider"], abs=0.0005)
    assert result.corpus == pytest.approx(official, abs=1e-9)


@given(st.text(max_size=40))
def test_tokens_have_one_space_between_and_are_tokens_again(text: str) -> None:
    tokens = tokenize(text)
    assert tokens == " ".join(tokens.split(" ")).strip()
    assert "  " not in tokens


# --- what runs in Java ---------------------------------------------------------------------------------------------


@needs_golden
@needs_java
@pytest.mark.parametrize("name", SETS)
def test_javas_tokenizer(name: str) -> None:
    predictions, references = read_raw(name)
    first = next(iter(predictions))
    predictions[first] += "\x0b\u2028 \r \x85\f"  # any of which would shift all captions after it
    result = caption_scores(predictions, references, tokenizer="java")
    official = official_scores(read(f"{name}_official_per_image.json")["corpus"])
    assert result.corpus == pytest.approx(official, abs=1e-6)


@pytest.mark.long
@needs_golden
@needs_java
def test_meteor() -> None:
    official = read("fakecap126_official_per_image.json")
    images = official["images"]
    result = caption_scores(
        {key: image["hyp_tok"] for key, image in images.items()},
        {key: image["refs_tok"] for key, image in images.items()},
        metrics=("meteor",),
        tokenizer=str.split,
    )
    assert result.corpus["meteor"] == pytest.approx(official["corpus"]["METEOR"], abs=1e-6)
    for key, image in images.items():
        assert result.per_image[key]["meteor"] == pytest.approx(image["METEOR"], abs=1e-6)


class Spec:
    """A stand-in for the folder of pycocoevalcap."""

    def __init__(self, folder: Path) -> None:
        self.submodule_search_locations = [str(folder)]


def no_tokens(text: str) -> str:
    raise AssertionError("something ran before Java was looked for")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metrics": ("bleu", "meteor")}, "^meteor needs"),
        ({"metrics": ("spice", "meteor")}, "^spice and meteor needs"),
        ({"tokenizer": "java"}, "^tokenizer='java' needs"),
    ],
)
def test_what_java_needs_is_looked_for_first(
    options: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": no_tokens, **options}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=named + r" pycocoevalcap; .*pip install 'vlmvqa\[captions\]'"):
        one("a", "a", **options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=named + " Java, and there is no `java` on the PATH"):
        one("a", "a", **options)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('openjdk version "17.0.9" 2023-10-17', "spice does not run on Java 17"),
        ('openjdk version "1.8.0_392"', "spice needs stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar"),
        ("no version at all", "spice needs stanford-corenlp-3.6.0.jar"),
    ],
)
def test_spice_needs_an_old_java_and_its_models(
    said: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", said))
    with pytest.raises(InputError, match=message):
        one("a", "a", metrics=["spice"], tokenizer=no_tokens)


def test_nothing_is_looked_for_where_nothing_runs_in_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", no_tokens)
    java.check([])


# --- input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ({}, {}, {}, "no reference answers"),
        ({1: "a"}, {2: ["a"]}, {}, "have no prediction"),
        ({1: "a"}, {1: "a"}, {}, "no list of reference answers"),
        ({1: None}, {1: ["a"]}, {}, "predictions are not text"),
        ({1: "a"}, {1: ["a"]}, {"metrics": ["rouge"]}, "metrics='rouge' is unknown; did you mean 'rouge_l'"),
        ({1: "a"}, {1: ["a"]}, {"tokenizer": "ptb"}, "tokenizer='ptb' is unknown"),
    ],
)
def test_bad_input_gets_one_sentence(predictions: Any, references: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        caption_scores(predictions, references, **options)


texts = st.lists(st.sampled_from(["a", "red", "car", "Dog.", "is", ",", "it's"]), max_size=7).map(" ".join)
records = st.dictionaries(st.integers(), st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1)


@given(records, st.randoms())
def test_range_order_and_unchanged(records: Any, shuffler: random.Random) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: captions for key, (_, captions) in records.items()}
    before = copy.deepcopy((predictions, references))
    result = caption_scores(predictions, references)
    assert (predictions, references) == before
    assert tuple(result.corpus) == NAMES and list(result.per_image) == list(references)
    for scores in (result.corpus, *result.per_image.values()):
        assert all(0 <= scores[name] <= (10 + 1e-9 if name == "cider" else 1) for name in NAMES)
    keys = list(records)
    shuffler.shuffle(keys)
    assert caption_scores(predictions, {key: references[key] for key in keys}) == result
    shuffled = {key: shuffler.sample(references[key], len(references[key])) for key in keys}
    assert caption_scores(predictions, shuffled) == result
