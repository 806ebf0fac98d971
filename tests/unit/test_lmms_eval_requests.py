"""lmms-eval's requests, without lmms-eval: rows, decoding settings, stop sequences."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.unit.test_predictor import predictor
from vlmvqa.errors import InputError
from vlmvqa.evaluation.lmms_eval_adapter.requests import Request, cut, decoding, digest, examples, one_image
from vlmvqa.models.interface import GenerationSettings

RED, BLUE = (Image.new("RGB", (28, 28), color) for color in ("red", "blue"))
PICTURES = (RED, RED, BLUE)


def request(document: int, number: int, text: str) -> Request:
    return Request("t", "val", document, number, digest(PICTURES[document]), text)


def test_questions_about_equal_images_share_a_row_in_the_order_of_the_documents() -> None:
    asked = [request(2, 0, "what?"), request(1, 0, "is it big?"), request(0, 1, "red?"), request(0, 0, "left?")]
    shared = examples(asked, "answer {question}\n", lambda one: PICTURES[one.document])
    assert [[question.id for question in one.questions] for one in shared] == [
        ["t/val/0/0", "t/val/0/1", "t/val/1/0"],
        ["t/val/2/0"],
    ]
    assert [question.prompt for question in shared[0].questions] == [
        "answer left?\n",
        "answer red?\n",
        "answer is it big?\n",
    ]
    assert examples(asked[::-1], "answer {question}\n", lambda one: RED)[0].questions == shared[0].questions

    apart = examples(asked, "answer {question}\n", lambda one: PICTURES[one.document], grouped=False)
    assert [one.name for one in apart] == ["image t/val/0", "image t/val/0", "image t/val/1", "image t/val/2"]
    model = predictor()
    found, alone = model.answer_examples(shared), model.answer_examples(apart)
    assert {name: answer.text for name, answer in found.items()} == {n: a.text for n, a in alone.items()}


def test_a_digest_is_that_of_the_pixels() -> None:
    assert digest(RED) == digest(RED.copy()) != digest(BLUE)
    assert digest(RED) != digest(RED.resize((14, 56))) and digest(RED) != digest(RED.convert("RGBA"))


def test_anything_but_one_image_is_refused() -> None:
    assert one_image([RED], "t/val/0") is RED
    for visuals, shown in (([], "nothing"), (None, "nothing"), ([RED, BLUE], "Image, Image"), (["a.mp4"], "str")):
        with pytest.raises(InputError, match=f"t/val/0 shows {shown}; this model answers questions about one image"):
            one_image(visuals, "t/val/0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": ["\n\n"], "do_sample": False}, {}),
        ({"max_new_tokens": 32, "num_beams": 3, "length_penalty": 0.5}, None),
        ({"temperature": 0.7}, None),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0, "top_p": 0.9, "top_k": 50, "image_aspect_ratio": "original"}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 1.0, "num_beams": None}, {"temperature": 0.7}),
    ],
    ids=str,
)
def test_generation_arguments(given: dict[str, object], expected: dict[str, object] | None) -> None:
    own = GenerationSettings(max_new_tokens=9)
    changed = {key: value for key, value in given.items() if key != "until"} if expected is None else expected
    assert decoding(own, given) == GenerationSettings(**{"max_new_tokens": 9, **changed})  # type: ignore[arg-type]


def test_beams_replace_a_static_cache() -> None:
    assert not decoding(GenerationSettings(static_cache=True), {"num_beams": 2}).static_cache


@pytest.mark.parametrize("given", [{"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.2}], ids=str)
def test_other_decoding_is_refused(given: dict[str, float]) -> None:
    name = list(given)[-1]
    with pytest.raises(InputError, match=f"generation argument {name}={given[name]} is not supported"):
        decoding(GenerationSettings(), given)


@pytest.mark.parametrize(
    ("until", "expected"),
    [(None, "a red\n\nball. yes"), ("\n\n", "a red"), ([".", "\n\n"], "a red"), (["."], "a red\n\nball"), ([""], None)],
)
def test_an_answer_ends_at_the_first_stop_sequence(until: str | list[str] | None, expected: str | None) -> None:
    text = "a red\n\nball. yes"
    assert cut(text, until) == (expected or text)
