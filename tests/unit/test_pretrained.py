"""Pretrained models: the library's own loss, the supervised tokens, answers one at a time and together."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vlmvqa
from tests import pretrained
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import build_pretrained, pretrained_config
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.extras.pretrained.processor import PretrainedProcessor
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.sequence.rows import IGNORE, IMAGE
from vlmvqa.training.optimizer import set_trainable

OURS = ("labels", "weights", "role", "block", "position", "branch", "document")
FAMILIES = pretrained.FAMILIES
Loaded = tuple[PretrainedVLM, PretrainedProcessor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: pretrained.save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def loaded(family: str, folders: dict[str, Path]) -> Loaded:
    return pretrained.load(folders[family])


def training_batch(processor: PretrainedProcessor, given: list[Example]) -> dict[str, Any]:
    rows = [[processor.encode(one, [one.questions[0].target])] for one in pretrained.apart(given)]
    return processor.collate(rows)


def asked_batch(processor: PretrainedProcessor, given: list[Example]) -> dict[str, Any]:
    return processor.collate([[processor.encode(one, [None])] for one in pretrained.apart(given)])


def librarys(model: PretrainedVLM, batch: dict[str, Any], **more: Any) -> Any:
    """transformers' own forward pass on the same batch, its labels where it wants them: at the tokens themselves."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, 1:] = batch["labels"][:, :-1]
    ids = batch["input_ids"].clone()
    inputs = {name: value for name, value in batch.items() if name not in OURS}
    return model.net(**{**inputs, "input_ids": ids}, labels=labels, **more)


def test_image_embeddings_are_what_the_decoder_reads(loaded: Loaded) -> None:
    model, processor = loaded
    batch, given = training_batch(processor, pretrained.examples(2)), []
    hook = model.language.register_forward_pre_hook(
        lambda _, inputs, named: given.append(inputs[0] if inputs else named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model.eval().decode(batch)
        found = model.image_embeddings(batch)
    hook.remove()
    assert torch.allclose(given[0][batch["role"] == IMAGE], found, atol=1e-6)


def with_ends(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows with the token that ends each answer, which is a label but never an input in ours."""
    wide = dict(batch)
    rows, length = batch["input_ids"].shape
    place = (batch["labels"] != IGNORE).int() * torch.arange(length)
    last = place.argmax(1)
    for name, value in batch.items():
        if value.shape == (rows, length):
            wide[name] = torch.nn.functional.pad(value, (0, 1), value=IGNORE if name == "labels" else 0)
    for row in range(rows):
        wide["input_ids"][row, last[row] + 1] = batch["labels"][row, last[row]]
        wide["attention_mask"][row, last[row] + 1] = 1
        if "token_type_ids" in wide:
            wide["token_type_ids"][row, last[row] + 1] = 1
    return wide


def test_the_loss_is_transformers_own(loaded: Loaded) -> None:
    model, processor = loaded
    batch = training_batch(processor, pretrained.examples())
    ours = model(**batch)
    theirs = librarys(model, with_ends(batch))
    assert ours["supervised_tokens"] == (batch["labels"] != IGNORE).sum()
    assert ours["loss"].item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    # and the gradients, of a weight of each part
    for part in ("vision", "projector", "language"):
        weight = model.part(part).parameters[0]
        (mine,) = torch.autograd.grad(ours["loss"], weight, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs.loss, weight, retain_graph=True)
        assert (mine - expected).norm() <= 1e-4 * expected.norm()


def test_a_static_cache_is_refused(folders: dict[str, Path]) -> None:
    model, _ = pretrained.load(folders["paligemma"])
    with pytest.raises(InputError, match="not supported by paligemma"):
        model.generate({}, [1], GenerationSettings(2, static_cache=True), [])


def test_the_comparison_has_teeth(folders: dict[str, Path]) -> None:
    """PaliGemma's loss is another where its answers saw ahead, or its prefix did not."""
    model, processor = pretrained.load(folders["paligemma"])
    batch = training_batch(processor, pretrained.examples())
    right = model(**batch)["loss"].item()
    for types in (torch.zeros_like(batch["token_type_ids"]), torch.ones_like(batch["token_type_ids"])):
        assert abs(model(**{**batch, "token_type_ids": types})["loss"].item() - right) > 1e-3


def test_paligemmas_rows_are_its_processors(folders: dict[str, Path]) -> None:
    """Token ids, types and labels as PaliGemmaProcessor makes them of prompt and suffix."""
    for family in ("paligemma", "paligemma2"):
        _, processor = pretrained.load(folders[family])
        for one in pretrained.apart(pretrained.examples()):
            (question,) = one.questions
            batch = with_ends(processor.collate([[processor.encode(one, [question.target])]], multiple=1))
            text = "<image>" + question.prompt.removesuffix("\n")
            theirs = processor.library(text=text, images=one.image, suffix=question.target, return_tensors="pt")
            assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
            assert batch["token_type_ids"].tolist() == theirs["token_type_ids"].tolist()
            labels = torch.nn.functional.pad(batch["labels"][:, :-1], (1, 0), value=IGNORE)
            assert labels.tolist() == theirs["labels"].tolist()
            assert torch.equal(batch["pixel_values"], theirs["pixel_values"])


def test_a_chat_models_rows_are_its_template(folders: dict[str, Path]) -> None:
    """Prompt and answer are what transformers makes of the whole turn by the chat template: one BOS at the most."""
    for family in ("idefics2", "idefics2-split", "llava"):
        _, processor = pretrained.load(folders[family])
        (one,) = pretrained.examples(1)
        batch = with_ends(processor.collate([[processor.encode(one, ["two"])]], multiple=1))
        question = one.questions[0].prompt.removesuffix("\n")
        turns: list[Any] = [
            {"role": "user", "content": [{"type": "image", "image": one.image}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        ]
        theirs = processor.library.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"][0]
        (ours,) = batch["input_ids"].tolist()
        assert ours == theirs[: len(ours)]
        assert not processor.tokenizer.decode(theirs[len(ours) :]).strip()  # a template's last line ends


def test_only_answer_and_end_are_supervised(loaded: Loaded, family: str) -> None:
    _, processor = loaded
    end = {"idefics2": "<end_of_utterance>"}.get(family.partition("-")[0], "<eos>")
    for one in pretrained.apart(pretrained.examples()):
        batch = processor.collate([[processor.encode(one, [one.questions[0].target])]])
        labels = batch["labels"][batch["labels"] != IGNORE]
        assert processor.tokenizer.decode(labels).strip() == f"{one.questions[0].target}{end}"
        # each label stands where it is predicted from: the next input is the label itself
        inputs, (row,) = batch["input_ids"][0].tolist(), batch["labels"].tolist()
        places = [place for place, label in enumerate(row) if label != IGNORE]
        assert all(inputs[place + 1] == row[place] for place in places[:-1])
        assert places == list(range(places[0], places[-1] + 1)) and batch["weights"].sum() == len(places)
        assert labels[-1].item() in processor.end_token_ids


def test_image_tokens_are_all_there(loaded: Loaded, family: str) -> None:
    """However short the text may be."""
    model, processor = loaded
    short = dataclasses.replace(processor, max_text_tokens=12)
    expected = {"paligemma": 16, "paligemma2": 16, "idefics2": 4, "idefics2-split": 20, "llava": 16}[family]
    for cut in (processor, short):
        batch = training_batch(cut, pretrained.examples())
        assert ((batch["role"] == IMAGE).sum(1) == expected).all()
        assert torch.isfinite(model(**batch)["loss"])


def test_a_long_question_is_cut_and_never_its_answer(loaded: Loaded) -> None:
    _, processor = loaded
    long = " ".join(f"word{number}" for number in range(60))
    question = Question(7, long, f"answer en {long}\n", "two", ("two",))
    whole = processor.tokenize(question, "two")
    limit = len(processor._ids(question.prompt)) + len(whole.answer) - 20
    cut = dataclasses.replace(processor, max_text_tokens=limit).tokenize(question, "two")
    assert cut.answer == whole.answer and len(cut.prompt) < len(whole.prompt)
    assert "answer en word0" in cut.prompt and "word59" not in cut.prompt
    with pytest.raises(InputError, match=r"question 7: its answer has .* data.max_text_tokens=8"):
        dataclasses.replace(processor, max_text_tokens=8).tokenize(question, "a very long answer indeed, which it is")
    with pytest.raises(InputError, match="question 7: its answer is empty"):
        processor.tokenize(question, " ")


def predictor(model: PretrainedVLM, processor: PretrainedProcessor, **decoding: Any) -> Predictor:
    settings = GenerationSettings(**{"max_new_tokens": 5, **decoding})
    return Predictor(model, processor, "answer en {question}\n", PretrainedSettings("somewhere"), settings)


@pytest.mark.parametrize("decoding", [{}, {"temperature": 1.0}, {"num_beams": 3}], ids=str)
def test_a_batch_answers_as_one_at_a_time(loaded: Loaded, decoding: dict[str, Any]) -> None:
    """Left padding, the order and the company change nothing."""
    model = predictor(*loaded, **decoding)
    given = pretrained.examples()
    together, alone = (model.answer_examples(given, batch_size=size) for size in (8, 1))
    assert len({round(answer.log_probability, 2) for answer in together.values()}) > 3
    for name, answer in together.items():
        assert answer.text == alone[name].text and answer.cut == alone[name].cut
        assert answer.log_probability == pytest.approx(alone[name].log_probability, abs=1e-3)


@pytest.mark.parametrize(
    "decoding",
    [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.5}],
    ids=str,
)
def test_the_log_probability_is_that_of_the_answer(loaded: Loaded, decoding: dict[str, Any]) -> None:
    """The one that the loss gives the same tokens."""
    model, processor = loaded
    given = pretrained.apart(pretrained.examples(3))
    written = model.generate(
        asked_batch(processor, given),
        processor.end_token_ids,
        GenerationSettings(max_new_tokens=6, **decoding),
        keys=range(len(given)),
    )
    for one, answer in zip(given, written, strict=True):
        encoded = processor.encode(one, [None])
        ended = len(answer.tokens) < 6
        for end in sorted(processor.end_token_ids) if ended else [processor.tokenizer.eos_token_id]:
            tokens = [*answer.tokens, end]
            forced = dataclasses.replace(encoded.questions[0], answer=tokens)  # type: ignore[type-var]
            batch = processor.collate([[dataclasses.replace(encoded, questions=[forced])]])
            scores = model.logits(model.decode(batch)[batch["labels"] != IGNORE]).log_softmax(-1)
            each = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            total = each.sum().item() if ended else each[:-1].sum().item()
            if total == pytest.approx(answer.log_probability, abs=1e-3):
                break
        else:
            pytest.fail(f"{answer} has another log-probability under the model")


def test_greedy_is_the_librarys_greedy(loaded: Loaded) -> None:
    model, processor = loaded
    batch = asked_batch(processor, pretrained.examples())
    ours = model.generate(batch, processor.end_token_ids, GenerationSettings(max_new_tokens=5))
    inputs = {n: v for n, v in batch.items() if n not in OURS}
    theirs = model.net.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=5, do_sample=False, eos_token_id=sorted(processor.end_token_ids), pad_token_id=0
    )
    for one, row in zip(ours, theirs[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        cut = next((place for place, token in enumerate(row) if token in processor.end_token_ids), len(row))
        assert one.tokens == row[:cut]


def test_a_published_penalty_changes_nothing(loaded: Loaded) -> None:
    """Decoding is what the run's record says; the model's own settings are saved as they came."""
    model, processor = loaded
    batch = asked_batch(processor, pretrained.examples())
    plain = model.generate(batch, processor.end_token_ids, GenerationSettings(max_new_tokens=5))
    model.net.generation_config.repetition_penalty = 5.0
    assert model.generate(batch, processor.end_token_ids, GenerationSettings(max_new_tokens=5)) == plain
    assert model.net.generation_config.repetition_penalty == 5.0


def test_a_blank_copy_has_the_same_weights(loaded: Loaded) -> None:
    """No more and no fewer: a tied head stays tied, and a copy of all weights computes the same."""
    model, processor = loaded
    blank = checkpoint.uninitialized_like(model, PretrainedSettings("-"))
    given = dict(model.named_parameters())
    here = dict(blank.named_parameters())
    assert here.keys() == given.keys()
    with torch.no_grad():
        for name, weight in here.items():
            weight.copy_(given[name])
    batch = asked_batch(processor, pretrained.examples())
    hidden = model.decode(batch)
    assert torch.equal(blank.logits(blank.decode(batch)), model.logits(hidden))


def test_saved_and_loaded_it_is_the_same(loaded: Loaded, tmp_path: Path) -> None:
    """By vlmvqa.load, and by transformers' own from_pretrained: the folder is both."""
    model = predictor(*loaded)
    given = pretrained.examples()
    with torch.no_grad():
        model.model.part("projector").parameters[0].add_(0.1)  # trained
    answers = model.answer_examples(given)
    model.save(tmp_path / "model")
    again = vlmvqa.load(tmp_path / "model", "cpu")
    assert again.answer_examples(given) == answers
    assert again.prompt == model.prompt and again.decoding == model.decoding
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    here = dict(model.model.named_parameters())
    assert all(torch.equal(weight, here[f"net.{name}"]) for name, weight in net.named_parameters())


def test_a_cast_model_says_its_type(loaded: Loaded, tmp_path: Path) -> None:
    model = predictor(*loaded)
    model.model.to(torch.bfloat16)
    model.settings = dataclasses.replace(model.settings, dtype="bfloat16")
    model.save(tmp_path / "model")
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert {weight.dtype for weight in net.parameters()} == {torch.bfloat16}


def test_an_untrained_one_is_asked_as_the_data_say(loaded: Loaded, family: str, folders: dict[str, Path]) -> None:
    model = vlmvqa.load(folders[family], "cpu")
    assert model.prompt_for("vqav2", "answer en {question}\n") == "answer en {question}\n"
    assert model.answer(pretrained.picture(1), "what colour is it?").text is not None


def test_beam_candidates_are_the_best_beams(loaded: Loaded) -> None:
    model, picture, asked = predictor(*loaded), pretrained.picture(1), ["what colour is it?", "is it?"]
    told = model.beam_candidates(picture, asked, most=3)
    best = dataclasses.replace(model, decoding=dataclasses.replace(model.decoding, num_beams=3))
    for beams, question in zip(told, asked, strict=True):
        alone = best.answer(picture, question)
        (same,) = [beam for beam in beams if beam.text == alone.text]
        assert same.log_probability == pytest.approx(alone.log_probability, abs=1e-4)
        assert beams == sorted(beams, key=lambda one: -one.probability)
        assert len({one.text for one in beams}) == len(beams)
        (greedy,) = model.beam_candidates(picture, question, most=1)
        assert greedy.text == model.answer(picture, question).text


def test_loading_shows_no_bar_of_transformers(
    family: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained.load(folders[family])
    assert capsys.readouterr().err == ""


def test_parts_are_the_whole(loaded: Loaded) -> None:
    model, _ = loaded
    counts = {part: sum(p.numel() for p in model.part(part).parameters) for part in ("vision", "projector", "language")}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters()) and min(counts.values()) > 0
    assert len(model.blocks) >= 4
    for part, choice, some in (("vision", 1, True), ("projector", "none", False), ("language", "all", True)):
        set_trainable(model.part(part), choice, part)  # type: ignore[arg-type]
        assert any(p.requires_grad for p in model.part(part).parameters) == some
    assert {model.part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"vision", "language"}


def test_recomputed_activations_change_nothing(loaded: Loaded) -> None:
    model, processor = loaded
    batch = training_batch(processor, pretrained.examples())

    def gradients(of: PretrainedVLM) -> dict[str, torch.Tensor]:
        of.train()(**batch)["loss"].backward()
        return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}

    other = copy.deepcopy(model)
    other.checkpoint_activations()
    kept, recomputed = gradients(model), gradients(other)
    assert kept.keys() == recomputed.keys()
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)


@pytest.mark.parametrize("written", ["<image>", "<eos>"])
def test_special_words_of_the_data_are_named(loaded: Loaded, written: str) -> None:
    _, processor = loaded
    with pytest.raises(InputError, match=f"question 7: {written} in its text or answer is a token of the model's own"):
        processor.tokenize(Question(7, "?", f"what is {written}?\n"), None)
    with pytest.raises(InputError, match="question 7"):
        processor.tokenize(Question(7, "?", "what?\n"), f"a {written}")


def test_a_model_with_saved_buffers_is_refused(loaded: Loaded) -> None:
    net = loaded[0].net
    net.base_model.register_buffer("scale", torch.ones(1), persistent=False)
    PretrainedVLM(net)
    net.base_model.register_buffer("scale", torch.ones(1))
    with pytest.raises(InputError, match=r"has a buffer model\.scale"):
        PretrainedVLM(net)


def test_what_cannot_be_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_splitting=True: PaliGemmaProcessor does not split images"):
        load_processor(str(folders["paligemma"]), image_splitting=True)
    with pytest.raises(InputError, match="is an architecture, which has no weights"):
        PretrainedSettings("paligemma")
    with pytest.raises(InputError, match="would change the shape"):
        PretrainedSettings("google/paligemma-3b-pt-224", overrides={"projection_dim": 3})
    with pytest.raises(InputError, match="no-such/model cannot be read"):
        pretrained_config(PretrainedSettings("no-such/model"))
    with pytest.raises(InputError, match=r"has no 'projection_dimension' .*projection_dim"):
        pretrained_config(PretrainedSettings("paligemma", "random", {"projection_dimension": 3}))
    (weights,) = folders["llava"].glob("*.safetensors")
    for file in folders["llava"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / weights.name).write_bytes(weights.read_bytes()[:5000])
    settings = PretrainedSettings(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        build_pretrained(settings, pretrained_config(settings))
