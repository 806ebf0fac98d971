"""BLEU-1 equals nltk's with HELM's arguments, and corpus BLEU equals sacrebleu's."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import corpus_bleu, helm_bleu_1

nltk = pytest.importorskip("nltk")
sacrebleu = pytest.importorskip("sacrebleu")
METRICS = (helm_bleu_1, corpus_bleu)


@pytest.fixture
def no_sentence_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear nltk's cached sentence model before and after."""
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    yield
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


@pytest.fixture
def sentence_model(no_sentence_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install an untrained sentence model: nltk's own needs a download."""
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def one(prediction: str, *answers: str) -> float:
    return helm_bleu_1({1: prediction}, {1: list(answers)}).score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"], 1),
        (" red\n", ["red"], 1),
        ("red.", ["red"], 1 / 2),
        ("Red", ["red"], 0),
        ("red red", ["red"], 1 / 2),
        ("a red car", ["red car", "car"], 2 / 3),
        ("red", ["red car"], math.exp(1 - 2)),
        ("don't", ["do n't"], 1),
        ("", ["red"], 0),
        ("", [""], 0),
        ("red", [""], 0),
    ],
)
def test_helm_bleu_1_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert one(prediction, *answers) == pytest.approx(score)


def test_the_best_reference_alone_counts() -> None:
    # nltk's own way with several references would find both words.
    assert one("red car", "red dog", "blue car") == 1 / 2


def test_the_mean_is_over_questions() -> None:
    result = helm_bleu_1({1: "red", 2: "red."}, {1: ["red"] * 9 + ["blue"], 2: ["red"]})
    assert (result.score, result.per_question) == (0.75, {1: 1.0, 2: 0.5})


@pytest.mark.usefixtures("no_sentence_model")
def test_inner_periods_need_the_sentence_model() -> None:
    with pytest.raises(InputError, match=r"'Mr\. Red' .*python -m nltk.downloader punkt_tab"):
        one("Mr. Red", "red")


@pytest.mark.usefixtures("sentence_model")
def test_sentences_lose_their_last_period() -> None:
    assert one("A dog. A cat.", "A dog . A cat .") == 1


words = st.lists(
    st.one_of(st.sampled_from(["red", "Red.", "don't", "$5", "(a)", "5.5", '"x"', "?!", "..."]), st.text(max_size=5)),
    max_size=5,
).map(" ".join)


@pytest.mark.usefixtures("sentence_model")
def test_is_nltks_sentence_bleu() -> None:
    from nltk.tokenize import word_tokenize
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    @given(words, words)
    def check(prediction: str, answer: str) -> None:
        # method1 smooths only the orders whose weight is 0 here, and without a warning for each.
        expected = sentence_bleu(
            [word_tokenize(answer)],
            word_tokenize(prediction.strip()),
            weights=(1, 0, 0, 0),
            smoothing_function=SmoothingFunction().method1,
        )
        assert one(prediction, answer) == pytest.approx(expected, abs=1e-12)

    check()


def test_corpus_bleu_is_sacrebleus() -> None:
    predictions = {1: "the cat sat on the mat", 2: "there is a dog here", 3: "no"}
    references = {1: ["the cat sat on a mat"], 2: ["there is a dog here", "a dog is here"], 3: ["no", "yes", "maybe"]}
    streams = [[texts[n] if n < len(texts) else None for texts in references.values()] for n in range(3)]
    expected = sacrebleu.corpus_bleu(list(predictions.values()), streams)
    result = corpus_bleu(predictions, references)
    assert (result.score, result.precisions, result.brevity_penalty) == (
        expected.score,
        tuple(expected.precisions),
        expected.bp,
    )
    assert "tok:13a" in result.signature and f"version:{sacrebleu.__version__}" in result.signature


def test_perfect_answers_score_100_if_any_has_four_words() -> None:
    answers = {1: "there is a dog", 2: "no"}
    assert corpus_bleu(answers, {key: ["x", text] for key, text in answers.items()}).score == pytest.approx(100)
    assert corpus_bleu({1: "no"}, {1: ["no"]}).score == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no reference answers"),
        ({1: "a"}, {2: ["a"]}, "have no prediction"),
        ({1: "a"}, {1: []}, "no list of reference answers"),
        ({1: 5}, {1: ["5"]}, "predictions are not text"),
    ],
)
def test_bad_input_gets_one_sentence(metric: Any, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric(predictions, references)


@pytest.mark.parametrize(("metric", "package"), [(helm_bleu_1, "nltk"), (corpus_bleu, "sacrebleu")])
def test_a_missing_package_is_named(metric: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"needs {package}; install it with: pip install 'vlmvqa\[captions\]'"):
        metric({1: "a"}, {1: ["a"]})


plain = st.lists(st.sampled_from(["red", "car", "a", "Red", "the"]), max_size=6).map(" ".join)
records = st.dictionaries(st.integers(), st.tuples(plain, st.lists(plain, min_size=1, max_size=3)), min_size=1)


@given(records, st.randoms())
def test_range_and_order(records: Any, shuffler: random.Random) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: answers for key, (_, answers) in records.items()}
    keys = list(records)
    shuffler.shuffle(keys)
    shuffled = {key: shuffler.sample(references[key], len(references[key])) for key in keys}
    for metric, most in ((helm_bleu_1, 1), (corpus_bleu, 100 + 1e-9)):
        result = metric(predictions, references)
        assert 0 <= result.score <= most
        assert metric(predictions, shuffled) == result
