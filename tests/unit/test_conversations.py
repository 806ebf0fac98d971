"""Conversations: the three formats, the loss mask, what each turn attends to, text-only rows, ratings."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.unit.test_predictor import predictor
from vlmvqa import fingerprint
from vlmvqa.data.datasets.conversations import read
from vlmvqa.data.example import Example, NoImage, Question
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.inference.answer_log import AnswerLog
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.sequence.masks import Tokens, visible
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, IGNORE, Document, TokenizedQuestion, build_row, pad_rows

TURNS = [("What is it?", "A cat."), ("What color?", "It is red."), ("Why?", "Nobody knows.")]
EOS = tiny.EOS


def png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "png")
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "1.png").write_bytes(png())
    return tmp_path


def llava(turns: list[tuple[str, str]] = TURNS, mark: str = "<image>\n", **more: Any) -> dict[str, Any]:
    said = [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]
    said[0]["value"] = mark + said[0]["value"]
    return {"id": "a", "image": "1.png", "conversations": said, **more}


def cauldron(turns: list[tuple[str, str]] = TURNS, **more: Any) -> dict[str, Any]:
    return {"images": ["1.png"], "texts": [{"user": u, "assistant": a, "source": "vqav2"} for u, a in turns], **more}


def written(root: Path, *content: dict[str, Any]) -> list[Example]:
    (root / "train.json").write_text(json.dumps(content))
    return read(root, "train")


# --- formats ------------------------------------------------------------------------------------------


def test_the_formats_of_llava_cauldron_and_finevision_are_read_alike(root: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra: pip install 'vlmvqa[hub]'")
    import pyarrow

    (first,) = written(root, llava())
    (root / "lines.jsonl").write_text(json.dumps(cauldron()) + "\n\n")
    (second,) = read(root, "lines")
    row = cauldron(relevance_ratings=[5, 5, 5])
    table = pyarrow.Table.from_pylist([{**row, "images": [{"bytes": png(), "path": None}]}])
    parquet.write_table(table, root / "part-00000-of-00001.parquet")
    (third,) = read(root, "part")
    (question,) = first.questions
    assert [(turn.text, turn.prompt, turn.target) for turn in (*question.history, question)] == [
        (user, f"{user}\n", assistant) for user, assistant in TURNS
    ]
    assert first.questions == second.questions == third.questions and question.answers == (TURNS[-1][1],)
    assert (first.image, second.image, third.image) == (root / "1.png", root / "1.png", png())


def test_images_of_a_list_and_none(root: Path) -> None:
    (root / "2.png").write_bytes(png())
    several, text = written(root, llava(image=["1.png", "2.png"], mark="<image><image>"), llava(image=None, mark=""))
    assert (several.image, several.more_images) == (root / "1.png", (root / "2.png",))
    assert isinstance(text.image, NoImage) and not text.more_images


def test_turns_with_low_ratings_are_dropped(root: Path) -> None:
    """Those without a rating too; a conversation without turns is left out."""
    rated = [cauldron(relevance_ratings=ratings) for ratings in ([5, 2, 4], [3, 4, None], [1, 1, 1])]
    (root / "train.json").write_text(json.dumps(rated))
    found = read(root, "train", min_ratings={"relevance_ratings": 3})
    kept = [[turn.target for turn in (*one.questions[0].history, one.questions[0])] for one in found]
    assert kept == [[TURNS[0][1], TURNS[2][1]], [TURNS[0][1], TURNS[1][1]]]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"question": "?"}, "it has neither 'conversations' (LLaVA) nor 'texts'"),
        (llava([("What?", " ")]), "a turn of the user or of the assistant is empty"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "are not turns from human and gpt"),
        (llava(image="3.png"), "3.png is missing"),
        (llava(mark="<image><image>"), "it has 1 images and 2 times <image>"),
        (
            {"conversations": [{"role": "user", "content": "x"}]},
            "it is in none of the known formats (KeyError: 'from')",
        ),
        ({"texts": [["What?", "A cat."]]}, "it is in none of the known formats"),
    ],
)
def test_bad_records_are_named(root: Path, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as refused:
        written(root, llava(), record)
    assert problem in str(refused.value) and "train.json, conversation 1" in str(refused.value)
    skipped = BadRecords("skip")
    assert len(read(root, "train", bad_records=skipped)) == 1 and len(skipped.listed()) == 1


def test_a_broken_line_does_not_move_the_others(root: Path) -> None:
    (root / "train.jsonl").write_text(
        '{"broken\n' + json.dumps(llava(image="3.png")) + "\n" + json.dumps(llava()) + "\n"
    )
    skipped = BadRecords("skip")
    assert len(read(root, "train", bad_records=skipped)) == 1
    assert [line for line in (1, 2) if f"train.jsonl, line {line}" in str(skipped.listed())] == [1, 2]


def test_two_files_of_a_split_are_refused(root: Path) -> None:
    (root / "train.jsonl").write_text(json.dumps(llava()))
    with pytest.raises(InputError, match=r"holds train\.json and train\.jsonl, two files of one split"):
        written(root, llava())


def test_the_history_is_part_of_every_key() -> None:
    """Of the data's fingerprint, and of the batches whose answers a resumed evaluation keeps."""
    asked = Question(1, "Why?", "Why?\n", "So.", ("So.",))
    given = [
        Example(Path("1.png"), 1, (replace(asked, history=(turn,)),)) for turn in (asked, replace(asked, target="No."))
    ]
    given.append(Example(Path("1.png"), 1, (asked,)))
    assert (
        len({fingerprint.examples([one]) for one in given}) == len({AnswerLog.batch_key([one]) for one in given}) == 3
    )


# --- rows ---------------------------------------------------------------------------------------------


def turns(*prompts: list[int]) -> list[TokenizedQuestion]:
    """Turns with these prompts, each answered by a token of its own and EOS."""
    return [TokenizedQuestion(prompt, [50 + n, EOS]) for n, prompt in enumerate(prompts)]


def conversation(*prompts: list[int]) -> TokenizedQuestion:
    *earlier, last = turns(*prompts)
    return TokenizedQuestion(last.prompt, last.answer, earlier=earlier)


def test_the_loss_mask_by_hand() -> None:
    """Every answer with its EOS is supervised, at the position before; EOS is an input between turns only."""
    row = build_row([Document([0], [conversation([10, 11], [12], [13, 14])])], 2, "blockwise_prefix").columns
    assert row["input_ids"] == [0, 0, 10, 11, 50, EOS, 12, 51, EOS, 13, 14, 52]
    expected = [*[IGNORE] * 3, 50, EOS, IGNORE, 51, EOS, IGNORE, IGNORE, 52, EOS]
    assert row["labels"] == expected
    assert row["weights"] == [float(label != IGNORE) for label in expected]
    assert row["position"] == list(range(12)) and row["branch"] == [0, 0, *[1] * 10]
    assert row["block"] == [0, 0, 1, 1, -1, -1, 2, -1, -1, 3, 3, -1]
    asked = TokenizedQuestion([13, 14], earlier=turns([10, 11], [12]))  # the model is to answer
    row = build_row([Document([0], [asked])], 2, "blockwise_prefix").columns
    assert row["input_ids"] == [0, 0, 10, 11, 50, EOS, 12, 51, EOS, 13, 14] and set(row["labels"]) == {IGNORE}


def test_what_each_turn_attends_to() -> None:
    """Decoded: the image, the turns before it and its own question; nothing of later turns or other conversations."""
    words = predictor().processor
    said = [Question(n, user, f"{user}\n", assistant) for n, (user, assistant) in enumerate(TURNS)]
    last = Question(2, said[2].text, said[2].prompt, said[2].target, history=tuple(said[:2]))
    documents = [Document([number], [words.tokenize(last, last.target)]) for number in range(2)]
    batch = pad_rows([build_row(documents, 1, "blockwise_prefix")])
    tokens = Tokens.of(batch)
    seen = visible(tokens.map(lambda t: t[:, :, None]), tokens.map(lambda t: t[:, None, :]))[0]
    ids, own = batch["input_ids"][0], batch["document"][0] == 1
    bos, eos = words.tokenizer.bos_token, words.tokenizer.eos_token
    text = ""
    for turn, (user, assistant) in enumerate(TURNS):
        text += f"{bos if turn == 0 else ''}{user}\n"
        prompt = own & (batch["block"][0] == 1 + turn)
        for query in prompt.nonzero().flatten().tolist():  # each token of the question
            keys = seen[query] & (batch["image_index"][0] < 0)
            assert words.tokenizer.decode(ids[keys]) == text
            assert (seen[query] & (batch["image_index"][0] >= 0)).sum() == 1
        text += f"{assistant}{eos}"


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_a_later_question_changes_nothing_before_it(pattern: str) -> None:
    """To the bit, in turn 1's hidden states; the later turn's own change."""
    model = tiny.model(pattern)
    hidden = []
    for second in ([20, 21, 22], [30, 31, 32]):
        document = Document([0], [conversation([10, 11, 12], second)])
        with torch.no_grad():
            hidden.append(model.decode(tiny.batch(model, [[document]], tiny.images(1)))[0])
    end = model.num_image_tokens + 3 + 2  # images, question, answer with EOS
    assert torch.equal(hidden[0][:end], hidden[1][:end])
    assert not torch.equal(hidden[0][end], hidden[1][end])


def test_the_answer_is_generated_after_the_history() -> None:
    model = tiny.model()
    rows = [
        [Document([0], [TokenizedQuestion([13, 14], earlier=turns([10, 11], [12]))])],
        [Document([1], [TokenizedQuestion([13, 14])])],
    ]
    batch = tiny.batch(model, rows, tiny.images(2))
    with torch.no_grad():
        written = model.generate(batch, [EOS], GenerationSettings(max_new_tokens=1))
        hidden = model.decode(batch)
        for row, found in enumerate(written):
            last = int((batch["document"][row] == 0).sum()) - 1
            best = int(model.logits(hidden[row, last][None]).argmax())
            assert (found.tokens or [EOS]) == [best]


# --- text only ----------------------------------------------------------------------------------------


def test_text_only_rows_run_every_module() -> None:
    """The grey image is in no row, and encoder and projector have a gradient of zero: ranks stay together."""
    own, model = predictor().processor, tiny.model(vocab_size=predictor().model.language.config.vocab_size)
    example = Example(NoImage(), 0, (Question(0, "a?", "a?\n", "b", ("b",)),))
    row = own.encode(example, ["b"])
    batch = own.collate([[row]])
    assert batch["pixel_values"].shape[0] == 1 and (batch["image_index"] < 0).all()
    model(**batch)["loss"].backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert name.startswith("language.") or not gradient.any(), name  # type: ignore[union-attr]
    picture = own.encode(Example(Image.new("RGB", (28, 28)), 1, example.questions), ["b"])
    mixed = own.collate([[row, picture]])  # the picture's features are those of the second image
    index = mixed["image_index"][mixed["image_index"] >= 0]
    assert index.tolist() == list(range(own.num_image_tokens, 2 * own.num_image_tokens))


def test_conversations_are_packed_by_their_length(root: Path) -> None:
    examples = written(root, *[llava()] * 3, llava(image=None, mark=""))
    processor = predictor().processor
    for budget in (None, 400):
        dataset = TrainDataset(examples, processor, RowSettings(row_tokens=budget), BadRecords())
        rows = [dataset[number] for number in range(len(dataset))]
        counts = sorted(len(build_row([one], processor.num_image_tokens, "causal")) for row in rows for one in row)
        assert counts == sorted(dataset.packing.lengths.tolist()) and counts[0] < counts[1]
    assert len(rows) < 4
