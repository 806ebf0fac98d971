"""From answers to results: the metric by name, its interval and controls, answers from a file, and going on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.test_predictor import predictor
from vlmvqa.data.datasets import gqa
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.synthetic import gqa as synthetic_gqa
from vlmvqa.inference import bootstrap
from vlmvqa.inference.answer_file import read_answers
from vlmvqa.inference.answer_log import AnswerLog
from vlmvqa.inference.evaluate import EvalSpec, evaluate, table
from vlmvqa.inference.predictor import Answer
from vlmvqa.metrics.registry import METRICS, check_options, check_scorable, metric, score

COLORS = ("red", "green", "blue", "grey")


def examples(images: int = 6) -> list[Example]:
    """Two questions an image: its color, and whether it is red; ten annotators agree but for one."""
    found = []
    for number in range(images):
        color = COLORS[number % len(COLORS)]
        asked = {"What color is it?": color, "Is it red?": "yes" if color == "red" else "no"}
        questions = tuple(
            Question(10 * number + place, text, text + "\n", answer, (answer,) * 9 + ("maybe",), text[:4], "other")
            for place, (text, answer) in enumerate(asked.items())
        )
        found.append(Example(Image.new("RGB", (8, 8), color), number, questions))
    return found


def knowing(given: Sequence[Example]) -> dict[int | str, Answer]:
    """What one answers who sees the picture."""
    answers: dict[int | str, Answer] = {}
    for example in given:
        assert isinstance(example.image, Image.Image)
        seen = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}.get(
            example.image.getpixel((0, 0)), "grey"
        )
        for question in example.questions:
            text = seen if "color" in question.text else "yes" if seen == "red" else "no"
            answers[question.id] = Answer(text, -0.5)
    return answers


def asked(**changes: Any) -> EvalSpec:
    return EvalSpec(**{"examples": examples(), "train": examples(8), "blank": True, "variants": True, **changes})


def test_a_model_that_sees_beats_its_controls() -> None:
    given = asked()
    found, records = evaluate(given, knowing(given.examples), knowing)
    numbers = found["metrics"]["vqa_accuracy"]
    assert found["n"] == 12 and numbers["overall"] == 100 == numbers["per_question_type"]["What"]
    assert numbers["interval"] == [100, 100] and numbers["n_per_question_type"] == {"What": 6, "Is i": 6}
    controls = found["controls"]
    assert all(controls[name]["overall"] < 100 for name in ("prior", "shuffled_images", "blank_images"))
    assert controls["prior"]["per_question_type"]["Is i"] > controls["prior"]["per_question_type"]["What"]
    assert set(found["variants"]) == {"normalize=always", "normalize=never", "consensus=min3"}
    assert [record["vqa_accuracy"] for record in records] == [100.0] * 12
    printed = table(found)
    header = "VQA accuracy (%) model majority baseline shuffled images blank images"
    assert " ".join(printed.splitlines()[0].split()) == header
    assert "95 % interval" in printed and "consensus=min3" in printed


def test_the_prior_is_of_the_training_split() -> None:
    other = [replace(one, questions=tuple(replace(q, target="two") for q in one.questions)) for one in examples()]
    found, _ = evaluate(asked(train=other), knowing(examples()), knowing)
    assert found["controls"]["prior"]["overall"] == 0


def test_the_interval_is_over_images() -> None:
    """Both questions of every second image are answered wrong."""
    given = asked()
    answers = {
        name: replace(one, text="what") if name // 10 % 2 else one for name, one in knowing(given.examples).items()
    }
    found, records = evaluate(given, answers, "no model")
    expected = bootstrap.bootstrap(
        {one["question_id"]: one["vqa_accuracy"] for one in records},
        {one["question_id"]: one["image_id"] for one in records},
    )
    assert expected is not None and expected.low < expected.high
    assert found["metrics"]["vqa_accuracy"]["interval"] == [expected.low, expected.high]


def test_controls_are_none_with_a_reason_never_0() -> None:
    given = asked(train="there is no training split", blank=False)
    found, _ = evaluate(given, knowing(given.examples), "no model was loaded")
    assert found["controls"]["prior"] == {"overall": None, "interval": None, "reason": "there is no training split"}
    assert found["controls"]["shuffled_images"]["reason"] == "no model was loaded"
    assert "majority baseline: there is no training split" in table(found)


def test_a_split_without_answers_is_not_scored() -> None:
    bare = [
        Example(e.image, e.image_id, tuple(Question(q.id, q.text, q.prompt) for q in e.questions)) for e in examples()
    ]
    found, records = evaluate(asked(examples=bare), knowing(bare), knowing)
    assert found["metrics"]["vqa_accuracy"]["overall"] is None and len(records) == 12
    assert all(control["overall"] is None for control in found["controls"].values())
    assert "the split has no answers" in table(found)


@pytest.mark.parametrize(
    "name", [name for name in METRICS if name not in ("gqa_accuracy", "corpus_bleu", "clip_similarity")]
)
def test_every_metric_scores_and_is_the_mean_of_its_questions(name: str) -> None:
    given = examples()
    answers = {question: answer.text for question, answer in knowing(given).items()} | {0: "purple thing"}
    found = score(given, answers, name)
    assert found.overall is not None and found.overall > 0
    assert found.overall == pytest.approx(sum(found.per_question.values()) / 12, abs=0.005)
    assert next(iter(found.numbers)) == name
    assert min(found.per_question, key=lambda question: found.per_question[question]) == 0


def test_a_number_of_the_whole_set_has_no_interval_and_no_questions_scores() -> None:
    given = asked(metric="corpus_bleu")
    found, records = evaluate(given, knowing(given.examples), "no model")
    assert (
        found["metrics"]["corpus_bleu"]["overall"] is not None and found["metrics"]["corpus_bleu"]["interval"] is None
    )
    assert all(record["corpus_bleu"] is None for record in records) and found["n"] == 12


def test_other_metrics_stand_beside_the_tasks_own() -> None:
    given = asked(extra_metrics={"exact_match": {}, "anls": {"threshold": 0.9}})
    found, _ = evaluate(given, knowing(given.examples), knowing)
    assert next(iter(found["metrics"])) == given.metric and {"exact_match", "anls"} < found["metrics"].keys()
    assert found["metrics"]["exact_match"]["overall"] == 100 and "exact_match" in table(found)
    assert all("exact_match" not in control for control in found["controls"].values())


def test_an_unknown_metric_suggests_one() -> None:
    with pytest.raises(InputError, match="anls"):
        metric("anl")


# --- answers from a file --------------------------------------------------------------------------------


def questions() -> list[Question]:
    return [question for example in examples(2) for question in example.questions]


RIGHT = [{"question_id": question.id, "answer": "red"} for question in questions()]


@pytest.mark.parametrize(
    "written",
    [
        "\n".join(json.dumps({**record, "log_probability": -1.0}) for record in RIGHT),
        json.dumps(RIGHT),
        json.dumps([{"questionId": str(record["question_id"]), "prediction": "red"} for record in RIGHT]),
    ],
    ids=["lines", "list", "text ids"],
)
def test_answers_are_read_from_our_file_and_from_the_benchmarks(tmp_path: Path, written: str) -> None:
    (tmp_path / "answers").write_text(written)
    found = read_answers(tmp_path / "answers", questions())
    assert {name: answer.text for name, answer in found.items()} == dict.fromkeys([0, 1, 10, 11], "red")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (RIGHT[:-1], "does not answer 1 of 4 questions .question 11 first"),
        ([*RIGHT, {"question_id": 77, "answer": "red"}], "record 5: the split has no question 77"),
        ([*RIGHT, RIGHT[0]], "record 5: question 0 is answered twice"),
        ([{"question_id": 0, "answer": 3}], "record 1: it should hold one of question_id"),
        (["red"], "record 1: it should hold"),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path: Path, records: list[Any], said: str) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match=said):
        read_answers(tmp_path / "answers.json", questions())


def test_answers_to_other_questions_are_passed_over_where_they_may_be(tmp_path: Path) -> None:
    """As of a whole split, of which some questions are scored."""
    (tmp_path / "answers.json").write_text(json.dumps([{"question_id": 77, "answer": "blue"}, *RIGHT]))
    found = read_answers(tmp_path / "answers.json", questions()[:2], others=True)
    assert {name: answer.text for name, answer in found.items()} == {0: "red", 1: "red"}
    with pytest.raises(InputError, match="does not answer 1 of 4 questions"):
        (tmp_path / "answers.json").write_text(json.dumps(RIGHT[1:]))
        read_answers(tmp_path / "answers.json", questions(), others=True)


def test_a_broken_list_is_located_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text('[{"question_id": 0, "answer": "a"},\n{"question_id": ]')
    with pytest.raises(InputError, match="line 2: broken JSON"):
        read_answers(tmp_path / "answers.json", questions())


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"question_id": 0, "answer": "a\u2028b"}\nred\n')
    with pytest.raises(InputError, match="line 2: broken JSON"):
        read_answers(tmp_path / "answers.jsonl", questions())
    with pytest.raises(InputError, match="does not exist; correct the path"):
        read_answers(tmp_path / "none", questions())


# --- going on -------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that were kept are not asked again, and all are those of an evaluation that was never stopped."""
    model, given = predictor(), examples(7)
    options: dict[str, Any] = {"batch_size": 2}
    expected = model.answer_examples(given, **options)
    answer_log, real = AnswerLog(tmp_path, {"checkpoint": "x"}), type(model)._answer_batch
    asked_for: list[int] = []

    def until_the_third(self: Any, rows: Any, readable: Any, columns: Any) -> Mapping[Any, Answer]:
        asked_for.append(len(rows))
        if len(asked_for) == 3:
            raise KeyboardInterrupt
        return real(self, rows, readable, columns)

    monkeypatch.setattr(type(model), "_answer_batch", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        model.answer_examples(given, answer_log=answer_log, **options)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text() + '{"batch": "cut in ha')
    assert model.answer_examples(given, answer_log=answer_log, **options) == expected
    assert len(asked_for) == 3 + 2  # of four batches two were kept
    assert model.answer_examples(given, answer_log=answer_log, **options) == expected and len(asked_for) == 5
    answer_log.remove()
    assert not list(tmp_path.iterdir())


def test_another_models_answers_are_not_taken(tmp_path: Path) -> None:
    model, given = predictor(), examples(2)
    one, other = (AnswerLog(tmp_path, {"checkpoint": name}) for name in ("x", "y"))
    model.answer_examples(given, answer_log=one)
    assert one.read() and not other.read()


# --- options of a metric --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("anls", {"inclusiv": False}, "data.metric_options has no key 'inclusiv' for anls.*inclusive"),
        ("exact_match", {"normalize": "always"}, "no key 'normalize' for exact_match .known: none"),
        ("vqa_accuracy", {"normalize": "alway"}, "normalize='alway' is unknown.*always"),
        ("gqa_accuracy", {"postprocess": "lava"}, "postprocess='lava' is unknown.*llava"),
        ("cider", {"metrics": ["bleu", "meteo"]}, "metrics='meteo' is unknown.*meteor"),
        ("anls", {"threshold": "high"}, "data.metric_options"),
    ],
)
def test_options_that_cannot_be_had_are_refused_before_anything_runs(
    name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_options(name, options)


def test_options_change_the_number_and_are_said() -> None:
    given = asked(metric="anls", options={"threshold": 0.9, "inclusive": False})
    answers = {question.id: Answer("maybee", -1.0) for question in given.questions}
    found, _ = evaluate(given, answers, "no model")
    assert found["metrics"]["anls"]["overall"] == 0 and "threshold=0.9" in found["metric_version"]
    usual, _ = evaluate(asked(metric="anls"), answers, "no model")
    assert usual["metrics"]["anls"]["overall"] > 80 and "threshold=0.9" not in usual["metric_version"]


def test_captions_are_scored_by_what_was_asked_for_and_cider() -> None:
    given = asked(metric="cider", options={"metrics": ["rouge_l"]})
    found, _ = evaluate(given, knowing(given.examples), "no model")
    assert list(found["metrics"]) == ["cider", "rouge_l"]


# --- what is counted ------------------------------------------------------------------------------------


def test_answers_that_the_limit_cut_are_counted() -> None:
    given = asked()
    answers = {name: Answer(one.text, -1.0, cut=name == 0) for name, one in knowing(given.examples).items()}
    found, _ = evaluate(given, answers, "no model")
    assert found["cut_short"] == 1 and "truncated at decoding.max_new_tokens: 1 of the answers" in table(found)
    model = predictor(max_new_tokens=1)
    assert all(answer.cut for answer in model.answer_examples(examples(2)).values())


def test_gqa_counts_its_balanced_questions_and_refuses_where_there_are_none(tmp_path: Path) -> None:
    root = synthetic_gqa.write(tmp_path / "gqa", train_images=2, val_images=6)
    everything = gqa.read(root, "val_all")
    questions = [question for example in everything for question in example.questions]
    balanced = sum(question.details["isBalanced"] for question in questions if question.details)
    answers = {question.id: Answer(question.answers[0], -1.0) for question in questions}
    found, _ = evaluate(EvalSpec(everything, "none", "gqa_accuracy"), answers, "no model")
    assert found["n"] == balanced < len(questions) and found["metrics"]["consistency"]["overall"] == 100
    with pytest.raises(InputError, match="lacks fields that the official evaluation reads"):
        check_scorable("gqa_accuracy", gqa.read(root, "train"))
    unbalanced = [q for q in questions if q.details and not q.details["isBalanced"]]
    with pytest.raises(InputError, match="no question of the evaluated split is balanced"):
        check_scorable("gqa_accuracy", [Example(b"", 1, tuple(unbalanced))])
