"""`vlmvqa.hf`: the model under transformers' classes computes, answers and saves what it does under ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    StoppingCriteria,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import vlmvqa
from tests import tiny
from tests.unit.test_predictor import examples, predictor
from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import pretrained_config
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.hf import VlmvqaConfig, VlmvqaForConditionalGeneration, VlmvqaProcessor
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, PADDING, SHAREABLE

# Every question once, 16 of different lengths, with an image of its own and together with those that share it.
EXAMPLES = examples()
ALONE = [(example.image, question.text) for example in EXAMPLES for question in example.questions]
TOGETHER = [(example.image, [question.text for question in example.questions]) for example in EXAMPLES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of saved models by attention pattern and family."""

    @cache
    def folder(attention_pattern: str = "blockwise_prefix", family: str = "gemma2", **decoding: Any) -> Path:
        made = model_of(attention_pattern, family, **decoding)
        path = tmp_path_factory.mktemp(f"{attention_pattern}-{family}")
        made.save(path)
        return path

    return folder


def model_of(attention_pattern: str, family: str, **decoding: Any) -> Predictor:
    """A predictor as `test_predictor.predictor` makes it, of any family of language models."""
    if family == "gemma2":
        return predictor(attention_pattern, **{"max_new_tokens": 6, **decoding})
    vlm = tiny.model(attention_pattern, family, vocab_size=300)
    processor = Processor(
        train_tokenizer(EXAMPLES, 300),
        ImageSettings(28, (0.5,) * 3, (0.5,) * 3),
        vlm.num_image_tokens,
        attention_pattern,
    )
    settings = tiny.settings(attention_pattern, family, vocab_size=300)
    return Predictor(vlm, processor, "{question}\n", settings, GenerationSettings(**{"max_new_tokens": 6, **decoding}))


def load(folder: Path) -> tuple[VlmvqaForConditionalGeneration, VlmvqaProcessor]:
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def inputs(processor: VlmvqaProcessor, asked: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
    return dict(processor(images=[image for image, _ in asked], text=[text for _, text in asked]))


def answers(
    model: VlmvqaForConditionalGeneration, processor: VlmvqaProcessor, asked: Sequence[tuple[Any, Any]], **options: Any
) -> list[str]:
    """The idiom of transformers: what follows the input."""
    given = inputs(processor, asked)
    sequences = model.generate(**given, **options)[:, given["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]


def expected(folder: Path, asked: Sequence[Example] = EXAMPLES, **decoding: Any) -> list[str]:
    """The answers of the core."""
    ours = vlmvqa.load(folder, "cpu")
    ours.decoding = replace(ours.decoding, **decoding)
    return [answer.text for answer in ours.answer_examples(asked).values()]


FAMILIES = [*((pattern, "gemma2") for pattern in ATTENTION_PATTERNS)]
FAMILIES += [("blockwise_prefix", family) for family in ("gemma", "llama", "qwen2", "mistral")]


@pytest.mark.parametrize(("pattern", "family"), FAMILIES)
def test_logits_and_loss_are_the_cores(folders: Any, pattern: str, family: str) -> None:
    folder = folders(pattern, family)
    (model, processor), ours = load(folder), vlmvqa.load(folder, "cpu")
    asked = TOGETHER if pattern in SHAREABLE else ALONE
    given = processor(
        images=[image for image, _ in asked],
        text=[texts for _, texts in asked],
        suffix=["red dog" if isinstance(texts, str) else [f"dog {text}" for text in texts] for _, texts in asked],
    )
    listed = [(image, [texts] if isinstance(texts, str) else texts) for image, texts in asked]
    rows = [
        [
            ours.processor.encode(
                ours.asked(image, texts), [f"dog {text}" if pattern in SHAREABLE else "red dog" for text in texts]
            )
        ]
        for image, texts in listed
    ]
    batch = ours.processor.collate(rows)  # padded on the right, to eights
    with torch.no_grad():
        found = model(**given)
        logits = ours.model.logits(ours.model.decode(batch))
        loss = ours.model(**batch)["loss"]
        last = model(**given, logits_to_keep=2).logits
    assert found.logits.shape[:2] == given["input_ids"].shape
    theirs = found.logits[given["attention_mask"].bool()]
    torch.testing.assert_close(theirs, logits[batch["document"] != PADDING], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, found.logits[:, -2:], atol=1e-5, rtol=1e-5)
    assert theirs.std() > 1  # not the logits of a model that says the same of everything


@pytest.mark.parametrize(("pattern", "family"), FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_the_cores(folders: Any, pattern: str, family: str, num_beams: int) -> None:
    """Question by question, and in shared rows; Gemma 2's and Mistral's window is shorter than every row."""
    folder = folders(pattern, family)
    model, processor = load(folder)
    told = expected(folder, num_beams=num_beams)
    assert len(set(told)) > 4
    assert answers(model, processor, ALONE, num_beams=num_beams) == told
    if pattern in SHAREABLE:
        assert answers(model, processor, TOGETHER, num_beams=num_beams) == told
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    assert window is None or window < min(inputs(processor, ALONE)["attention_mask"].sum(1))


def test_all_beams_are_the_cores(folders: Any) -> None:
    folder = folders()
    (model, processor), ours = load(folder), vlmvqa.load(folder, "cpu")
    image, texts = TOGETHER[2]
    found = answers(model, processor, [(image, texts)], num_beams=4, num_return_sequences=4)
    decoding = replace(ours.decoding, num_beams=4)
    batch = ours.batch([ours.processor.encode(ours.asked(image, texts), [None] * len(texts))])
    beams = ours.model.beam_candidates(batch, ours.processor.end_token_ids, decoding)
    told = [answer.text for question in beams for answer in ours._written(question, decoding)]
    assert found == told and len(set(told)) > len(texts)


def test_the_returned_sequence_is_the_input_and_the_answer(folders: Any) -> None:
    model, processor = load(folders())
    given = inputs(processor, ALONE)
    sequences = model.generate(**given)
    length = given["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], given["input_ids"]) and sequences.shape[1] <= length + 6
    assert processor.decode(sequences[0], skip_special_tokens=True).startswith("what color\n"[: len(ALONE[0][1])])
    shared = inputs(processor, TOGETHER)
    found = model.generate(**shared)
    texts = processor.batch_decode(found[:, : shared["input_ids"].shape[1]], skip_special_tokens=True)
    assert texts == [f"{text}\n" for _, text in ALONE]


def test_padding_does_not_matter(folders: Any) -> None:
    """Not on the left, where the processor puts it, not on the right, and not the company in the batch."""
    folder = folders()
    model, processor = load(folder)
    told = expected(folder)
    assert [answer for one in ALONE for answer in answers(model, processor, [one])] == told
    given = inputs(processor, TOGETHER)
    on_the_right = {
        name: column if name == "pixel_values" else torch.cat([column, torch.zeros_like(column[:, :3])], dim=1)
        for name, column in given.items()
    }
    sequences = model.generate(**on_the_right)
    found = processor.batch_decode(sequences[:, given["input_ids"].shape[1] + 3 :], skip_special_tokens=True)
    assert [text.strip() for text in found] == told


def test_sampling_depends_on_the_seed(folders: Any) -> None:
    model, processor = load(folders())

    def sample(seed: int, asked: Any = ALONE, **options: Any) -> list[str]:
        set_seed(seed)
        return answers(model, processor, asked, do_sample=True, **{"top_k": 0, **options})

    assert sample(0) == sample(0) != sample(1)
    assert sample(0) == sample(0, TOGETHER)
    assert sample(0, top_k=1) == expected(folders())
    several = sample(0, TOGETHER[:1], num_return_sequences=5, top_p=0.9, temperature=2.0)
    assert len(several) == 10 and len(set(several)) > 4


def test_options_of_generate(folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders()
    model, processor = load(folder)
    told = expected(folder)
    assert answers(model, processor, TOGETHER, use_cache=False) == told
    assert answers(model, processor, TOGETHER, use_cache=False, num_beams=3) == expected(folder, num_beams=3)
    assert answers(model, processor, TOGETHER, generation_config=GenerationConfig(use_cache=False)) == told
    assert answers(model, processor, TOGETHER, prefill_chunk_size=2) == told
    assert [answers(model, processor, [one], prompt_lookup_num_tokens=2)[0] for one in ALONE] == told
    given = inputs(processor, TOGETHER)
    found = model.generate(**given, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert len(found.scores) == len(found.logits) == found.sequences.shape[1] - given["input_ids"].shape[1]
    log_probability = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    ours = list(vlmvqa.load(folder, "cpu").answer_examples(EXAMPLES).values())
    sums = log_probability.masked_fill(log_probability.isinf(), 0).sum(1).tolist()
    assert sums == pytest.approx([answer.log_probability for answer in ours], abs=1e-3)

    class Three(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= given["input_ids"].shape[1] + 3)

    assert model.generate(**given, stopping_criteria=[Three()]).shape[1] == given["input_ids"].shape[1] + 3
    model.generate(**inputs(processor, ALONE[:1]), streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == told[0]
    with pytest.raises(ValueError, match=r"not used by the model: \['max_new_token'\]"):
        model.generate(**given, max_new_token=3)


@pytest.mark.parametrize(
    ("decoding", "found"),
    [
        ({"max_new_tokens": 3}, {"max_new_tokens": 3, "num_beams": 1, "do_sample": None}),
        ({"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5, "top_k": 0}),
    ],
)
def test_the_saved_decoding_is_the_default(folders: Any, decoding: dict[str, Any], found: dict[str, Any]) -> None:
    folder = folders(**decoding)
    model, processor = load(folder)
    config = model.generation_config
    assert {name: getattr(config, name) for name in found} == found
    assert config.eos_token_id == [processor.tokenizer.eos_token_id] and config.pad_token_id == 0
    if "temperature" not in decoding:
        assert answers(model, processor, ALONE) == expected(folder)


def test_the_end_is_the_tokenizers(folders: Any, tmp_path: Path) -> None:
    """Not that of the decoder's config, which may belong to another tokenizer."""
    folder = folders()
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["language_config"] |= {"eos_token_id": 7, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == ([1], 1)


# --- saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_what_is_saved_loads_in_both_directions(folders: Any, tmp_path: Path, pattern: str) -> None:
    folder = folders(pattern)
    model, processor = load(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours, again = vlmvqa.load(folder, "cpu"), vlmvqa.load(tmp_path, "cpu")
    assert expected(tmp_path) == expected(folder)
    assert (again.settings, again.prompt, again.decoding) == (ours.settings, ours.prompt, ours.decoding)
    assert again.processor == replace(ours.processor, tokenizer=again.processor.tokenizer)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    reloaded = load(tmp_path)
    assert answers(*reloaded, ALONE) == answers(model, processor, ALONE)
    again.save(tmp_path)
    assert answers(*load(tmp_path), ALONE) == answers(model, processor, ALONE)


def test_a_changed_generation_config_is_kept(folders: Any, tmp_path: Path) -> None:
    model, _ = load(folders())
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config.max_new_tokens == 2


def test_another_data_type(folders: Any, tmp_path: Path) -> None:
    folder = folders()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    ours, processor = vlmvqa.load(folder, "cpu", "bfloat16"), AutoProcessor.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in ours.model.named_buffers()}
    told = [answer.text for answer in ours.answer_examples(EXAMPLES, batch_size=1).values()]
    found = answers(model, processor, ALONE)
    assert sum(a == b for a, b in zip(found, told, strict=True)) > 0.6 * len(told)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert vlmvqa.load(tmp_path, "cpu").dtype == "bfloat16"


def test_a_folder_of_before_loads_as_it_did(folders: Any, tmp_path: Path) -> None:
    folder = folders()
    vlmvqa.load(folder, "cpu").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("model_type", "architectures", "end_token_ids"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected(tmp_path) == expected(folder)


def test_the_config_is_ours(folders: Any) -> None:
    config = AutoConfig.from_pretrained(folders("causal"))
    saved = json.loads((folders("causal") / "config.json").read_text())
    assert isinstance(config, VlmvqaConfig) and config.prompt == "{question}\n"
    assert config.get_text_config().attn_logit_softcapping == 5.0
    assert config.model_settings().attention_pattern == "causal"
    written, language = json.loads(json.dumps(config.to_dict())), saved.pop("language_config")
    del language["transformers_version"]
    assert {name: written["language_config"][name] for name in language} == language
    assert {name: written[name] for name in saved} == saved


def test_missing_weights_are_an_error(folders: Any, tmp_path: Path) -> None:
    weights = load_file(folders() / "model.safetensors")
    del weights["vision.encoder.cls_token"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders() / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"holds no weights of vision\.encoder; save or copy the model again"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_new_model_is_initialized(folders: Any) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folders()))
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert model.vision.encoder.pos_embed.std() > 0.5  # as `build_vision_encoder` makes it


def test_push_to_hub(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, list[str]] = {}

    def keep(self: Any, folder: str, repo_id: str, *_: Any, **__: Any) -> None:
        pushed[type(self).__name__] = sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file())

    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    card = SimpleNamespace(save=lambda path: Path(path).write_text(""))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", keep)
    for part in load(folders()):
        part.push_to_hub("somebody/model")
    assert pushed == {
        "VlmvqaForConditionalGeneration": [
            *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        ],
        "VlmvqaProcessor": ["README.md", "config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"],
    }


# --- pipeline and chats ------------------------------------------------------------------------------------


def message(image: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


SLOWLY = [pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("causal", "image_prefix")]


@pytest.mark.parametrize("pattern", ["blockwise_prefix", "prefix_lm", *SLOWLY])
def test_the_pipeline(folders: Any, pattern: str, tmp_path: Path) -> None:
    folder = folders(pattern)
    told = expected(folder)
    ask = pipeline("image-text-to-text", model=str(folder))
    images, texts = [image for image, _ in ALONE], [text for _, text in ALONE]

    def new(found: Any) -> list[str]:
        return [one["generated_text"].strip() for one in found]

    assert new(ask(images=images, text=texts, return_full_text=False)) == told
    (one,) = ask(images=images[0], text=texts[0], return_full_text=False)
    assert one["generated_text"].strip() == told[0] and one["input_text"] == texts[0]
    (full,) = ask(images=images[0], text=texts[0])  # as for PaliGemma: the question, and what was generated
    assert full["generated_text"] == texts[0] + one["generated_text"]
    (chat,) = ask(text=message(images[0], texts[0]))
    assert chat["generated_text"][-1] == {"role": "assistant", "content": one["generated_text"]}
    chats = [message(image, text) for image, text in ALONE]
    assert new(found[0] for found in ask(text=chats, return_full_text=False)) == told
    images[0].save(tmp_path / "a.png")
    (path,) = ask(images=str(tmp_path / "a.png"), text=texts[0], return_full_text=False)
    assert path == one
    beams = ask(images=images[:3], text=texts[:3], return_full_text=False, generate_kwargs={"num_beams": 3})
    assert new(beams) == expected(folder, num_beams=3)[:3]


def test_the_pipeline_complains_of_nothing(folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        ask = pipeline("image-text-to-text", model=str(folders()))
        ask(text=message(*ALONE[0]), max_new_tokens=2)
    assert not caplog.records


def test_the_chat_template(folders: Any) -> None:
    processor = AutoProcessor.from_pretrained(folders())
    (image, text), one = ALONE[0], message(*ALONE[0])
    assert processor.apply_chat_template(one, add_generation_prompt=True) == text
    given = processor.apply_chat_template(one, tokenize=True, return_dict=True, return_tensors="pt")
    direct = processor(images=image, text=text)
    assert all(torch.equal(given[name], column) for name, column in direct.items())
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    for wrong, reason in (
        ([*one, said], "has no conversations"),
        ([{**one[0], "role": "system"}], "has no conversations"),
        ([{"role": "user", "content": "what"}], "has no conversations"),
        ([{"role": "user", "content": one[0]["content"][1:]}], "a message has 0 images and 1 texts"),
        ([{"role": "user", "content": one[0]["content"] * 2}], "a message has 2 images and 2 texts"),
    ):
        with pytest.raises(TemplateError, match=f"{reason}.*; ask with one message"):
            processor.apply_chat_template(wrong)


# --- the processor -----------------------------------------------------------------------------------------


def test_images_are_read_as_ours(folders: Any, tmp_path: Path) -> None:
    """From PIL, a path or what transformers' loader takes; transparency as in the core."""
    processor = AutoProcessor.from_pretrained(folders())
    own = vlmvqa.load(folders(), "cpu").processor
    picture = Image.new("RGBA", (40, 30), (200, 30, 90, 100))
    picture.save(tmp_path / "a.png")
    told = own.load_images(Example(tmp_path / "a.png", 0, ())).images[0]
    for image in (picture, str(tmp_path / "a.png"), tmp_path / "a.png", [picture], [[picture]]):
        assert torch.equal(processor(images=image, text="what")["pixel_values"][0], told)
    content = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    assert processor(images=f"data:image/png;base64,{content}", text="what")["pixel_values"].shape == (1, 3, 28, 28)


def test_tiles_are_read_as_ours(tmp_path: Path) -> None:
    """Rows of different numbers of tiles, and several questions a row: the answers of the core."""
    ours = model_of("blockwise_prefix", "gemma2")
    ours.processor = replace(ours.processor, images=replace(ours.processor.images, tiles={"max": 4}))
    ours.save(tmp_path)
    model, processor = load(tmp_path)
    sizes = [(60, 60), (20, 20), (90, 40), (60, 60), (28, 28), (30, 90)]
    large = [replace(one, image=one.image.resize(size)) for one, size in zip(EXAMPLES, sizes, strict=True)]  # type: ignore[union-attr]
    asked = [(one.image, [question.text for question in one.questions]) for one in large]
    assert len(inputs(processor, asked)["pixel_values"]) == 5 + 1 + 4 + 5 + 1 + 4
    assert answers(model, processor, asked) == expected(tmp_path, large) != expected(tmp_path, EXAMPLES)


PICTURE = ALONE[0][0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"text": "what"}, "there are 0 images and 1 entries of text"),
        ({"images": [PICTURE], "text": ["what", "is it"]}, "there are 1 images and 2 entries of text"),
        ({"images": [PICTURE], "text": [["what", " "]]}, "no question is given, or one is empty"),
        ({"images": [PICTURE], "text": [[]]}, "no question is given, or one is empty"),
        ({"images": [[PICTURE] * 2], "text": "what"}, "a text has several images or none"),
        ({"images": PICTURE, "text": "what", "suffix": ["red", "blue"]}, "suffix should hold an answer for each"),
        ({"images": PICTURE, "text": "what", "max_length": 3}, "the processor does not support max_length"),
        ({"images": PICTURE, "text": "what", "return_tensors": "np"}, "does not support return_tensors=np"),
        ({"images": "nothing.jpg", "text": "what"}, "image 0 is no PIL image, path or URL of an image"),
        ({"images": "https://127.0.0.1:9/a.jpg", "text": "what"}, r"image 0 is no PIL image.*refused"),
        ({"images": "x" * 5000, "text": "what"}, r"image 0 is no PIL image.*\); correct it"),
        ({"images": 3, "text": "what"}, "image 0 is no PIL image, path or URL of an image"),
    ],
    ids=range(12),
)
def test_wrong_input_is_one_sentence(folders: Any, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        AutoProcessor.from_pretrained(folders())(**given)


def test_under_prefix_lm_each_question_has_its_own_image(folders: Any) -> None:
    processor = AutoProcessor.from_pretrained(folders("prefix_lm"))
    with pytest.raises(InputError, match=r"prefix_lm, where an image sees its question; give each question its own"):
        inputs(processor, TOGETHER)


def test_a_model_without_rows_is_one_sentence(folders: Any) -> None:
    model, processor = load(folders())
    given = inputs(processor, ALONE[:1])
    with pytest.raises(InputError, match="the input has no branch, role, block; pass all that the processor returns"):
        model.generate(**{name: given[name] for name in given if name not in ("branch", "role", "block")})
    with pytest.raises(InputError, match="the input has no pixel_values"):
        model(input_ids=given["input_ids"])
    with pytest.raises(InputError, match="leave past_key_values out"):
        model.generate(**given, past_key_values=model(**given, use_cache=True).past_key_values)
    with pytest.raises(InputError, match="returns neither attentions nor hidden states"):
        model.generate(**given, output_hidden_states=True, return_dict_in_generate=True)


def test_softcaps_cannot_be_dropped(folders: Any) -> None:
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        AutoModelForImageTextToText.from_pretrained(folders(), attn_implementation="sdpa")
    model, _ = load(folders())
    with pytest.raises(InputError, match="the attention of this model cannot be exchanged"):
        model.set_attn_implementation("eager")
    assert model.vlm.describe_attention() == "blockwise_prefix, dense (softcap)"


@pytest.mark.slow
def test_transformers_trainer_trains_the_model(folders: Any, tmp_path: Path) -> None:
    """In shared rows, with the processor as collate function; its checkpoint is a model of ours."""
    model, processor = load(folders())

    def collate(rows: Sequence[tuple[Any, list[str]]]) -> dict[str, Tensor]:
        texts = [texts for _, texts in rows]
        answers = [["red" if len(text) % 2 else "blue" for text in row] for row in texts]
        return dict(processor(images=[image for image, _ in rows], text=texts, suffix=answers))

    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=5,
            save_steps=30,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=TOGETHER,
        data_collator=collate,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    told = [answer in ("red", "blue") for answer in expected(tmp_path / "checkpoint-30")]
    assert sum(told) > 12


# --- next to the other models ------------------------------------------------------------------------------


def test_our_models_are_not_taken_for_pretrained_ones(folders: Any) -> None:
    with pytest.raises(InputError, match="is not a vision-language model of transformers but of model_type vlmvqa"):
        pretrained_config(PretrainedSettings(str(folders())))


PROGRAM = """\
import sys
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import PretrainedSettings, pretrained_config

try:
    pretrained_config(PretrainedSettings(sys.argv[1]))
except InputError as error:
    print(error)

import vlmvqa.hf
from transformers import pipeline

ask = pipeline("image-text-to-text", model=sys.argv[1])
print(ask(images=sys.argv[2], text=sys.argv[3], return_full_text=False)[0]["generated_text"].strip())
"""


@pytest.mark.slow
def test_a_fresh_process(folders: Any, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    words = [sys.executable, "-c", PROGRAM, str(folders()), str(tmp_path / "a.png"), ALONE[0][1]]
    refused, answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().split("\n", 1)
    assert "is a model of this project, not of transformers; to train it further, name it as init_from" in refused
    assert answer == expected(folders())[0]
