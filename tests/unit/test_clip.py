"""CLIP similarity on a small random CLIP, saved and loaded as a real one is."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from vlmvqa.errors import InputError
from vlmvqa.metrics import clip_similarity

CAPTIONS = {1: "a dog on a beach", 2: "two buses", "c": "", 4: "a very " + "long " * 40 + "caption"}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small CLIP with a character tokenizer."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: n for n, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**LAYERS, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 32},
        vision_config={**LAYERS, "image_size": 28, "patch_size": 7},
        projection_dim=16,
        initializer_factor=8.0,
    )
    torch.manual_seed(2)  # of whose cosines three are positive and one is negative
    made = tmp_path_factory.mktemp("clip")
    CLIPModel(config).eval().save_pretrained(made)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(pictures, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(made)
    return made


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


IMAGES: dict[Any, Any] = {key: picture(n) for n, key in enumerate(CAPTIONS)}


def test_is_the_models_own_cosine(folder: Path) -> None:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    result = clip_similarity(CAPTIONS, IMAGES, model=folder)
    for key, caption in CAPTIONS.items():
        inputs = processor(
            text=[f"A photo depicts {caption}"],
            images=[IMAGES[key]],
            return_tensors="pt",
            truncation=True,
            max_length=32,
        )
        with torch.inference_mode():
            found = model(**inputs)
        cosine = (found.text_embeds @ found.image_embeds.T).item()
        assert result.per_question[key] == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
    assert result.score == pytest.approx(sum(result.per_question.values()) / 4)
    assert len(set(result.per_question.values())) > 1


def test_batches_and_order_do_not_matter(folder: Path) -> None:
    result = clip_similarity(CAPTIONS, IMAGES, model=folder)
    keys = list(CAPTIONS)
    random.Random(1).shuffle(keys)
    again = clip_similarity({key: CAPTIONS[key] for key in keys}, IMAGES, model=str(folder), batch_size=3)
    assert again.per_question == pytest.approx(result.per_question, abs=1e-5)


def test_the_prefix_counts(folder: Path) -> None:
    first, second = (clip_similarity({2: "two"}, {2: IMAGES[2]}, model=folder, prefix=p).score for p in ("a ", "zq "))
    assert first != second


def test_pictures_in_files_and_bytes(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    IMAGES[1].save(file)
    images = {1: IMAGES[1], 2: file, 3: str(file), 4: file.read_bytes()}
    result = clip_similarity(dict.fromkeys(images, "a dog"), images, model=folder)
    assert len({round(score, 5) for score in result.per_question.values()}) == 1


@pytest.mark.parametrize(
    ("predictions", "images", "message"),
    [
        ({}, {}, "no captions to score"),
        ({1: "a", 2: "b"}, {1: "x.png"}, r"1 of 2 questions have no image \(2\)"),
        ({1: "a"}, {1: "x.png", 2: "y.png"}, r"1 of 2 questions have no caption \(2\)"),
        ({1: None}, {1: "x.png"}, "predictions are not text"),
        ({1: "a"}, {1: "nowhere.png"}, "nowhere.png does not exist"),
        ({"q": "a"}, {"q": b"GIF?"}, "the image of 'q' is not an image"),
    ],
)
def test_bad_input_gets_one_sentence(folder: Path, predictions: Any, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip_similarity(predictions, images, model=folder)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded .*give the local folder") as error:
        clip_similarity({1: "a"}, {1: picture(0)}, model=tmp_path)
    assert "\n" not in str(error.value)
