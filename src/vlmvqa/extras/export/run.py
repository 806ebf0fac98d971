"""Export a trained model, load the result with transformers alone, and compare both on random images."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmvqa.config.schema import RunSettings
from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.loading import load_model

# Modules with a function `convert(trained)` that returns a model and a processor of transformers,
# and `notes(trained)`: in which cases they differ from the trained ones.
FORMATS = {"paligemma": "vlmvqa.extras.export.paligemma"}
QUESTIONS = ("what is in the picture?", "How many are there, 2 or 3?", "is it left of the other one")
CLOSE = 5e-5  # largest allowed difference of logits, as a share of the largest logit

CARD = """\
# {name}

A vision-language model trained with vlmvqa, exported as {architecture}. It loads with transformers alone:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}", backend="pil")
image = Image.open("photo.jpg").convert("RGB")
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what is this?"}}]}}]
prompt = processor.apply_chat_template(chat)
inputs = processor(images=image, text=prompt, return_tensors="pt")
written = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(written, skip_special_tokens=True)[0])
```

Images must be RGB and upright (`PIL.ImageOps.exif_transpose`). Without `backend="pil"` some pixels differ by 1 of 255.
Its scores are those of `{checkpoint}`.
"""


@dataclass(frozen=True)
class ExportConfig:
    """Config of launch/export.py; conf/export.yaml documents its keys."""

    run: RunSettings
    checkpoint: str
    output: str
    format: str = "paligemma"
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sample:
    """A model's input and output for an image and a question.

    Attributes:
        ids: token ids of the prompt, image tokens left out.
        pixels: float[3, H, H].
        logits: float[V], of the first token of the answer.
    """

    ids: list[int]
    pixels: Tensor
    logits: Tensor


def export(config: ExportConfig) -> None:
    """Write the exported model to `output`, with `export.json`: the differences between both models' outputs.

    Raises:
        InputError: an unknown format, a model that the format cannot express, or an output that differs.
    """
    if config.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"format={config.format} is unknown; use {known}{suggest(config.format, FORMATS)}")
    output = Path(config.output).expanduser()
    if output.exists() and any(output.iterdir()) and not config.run.overwrite:
        raise InputError(f"output={config.output} is not empty; name a new folder, or set run.overwrite=true")
    trained = load_model(config.checkpoint)
    if trained.adapter is not None:
        raise InputError(
            f"checkpoint={config.checkpoint} is an adapter; merge it into its base first, with launch/merge.py "
            f"adapter={config.checkpoint} output=..."
        )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    architecture = importlib.import_module(FORMATS[config.format])
    model, processor = architecture.convert(trained)
    notes = architecture.notes(trained)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    card = CARD.format(
        name=output.name, architecture=type(model).__name__, folder=config.output, checkpoint=config.checkpoint
    )
    card += "".join(f"\n{note}\n" for note in notes)
    (partial / "README.md").write_text(card, encoding="utf-8")
    del model, trained
    gc.collect()
    found = compare(config.checkpoint, partial)
    (partial / "export.json").write_text(
        json.dumps({"checkpoint": config.checkpoint, **asdict(found)}, indent=2) + "\n"
    )
    if not found.equal:
        raise InputError(
            f"the exported model in {partial} differs from checkpoint={config.checkpoint} ({found}); please report it "
            "with the command and the versions"
        )
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    print(f"{config.checkpoint} and {output} compute the same: {found}", *notes, sep="\n")
    print(f"load it with AutoModelForImageTextToText.from_pretrained({config.output!r}); see {output / 'README.md'}")


@dataclass(frozen=True)
class Difference:
    """How two models differ on the sample questions.

    Attributes:
        ids: whether their token ids are equal.
        pixels: largest difference of a pixel value before normalisation, in 1/255.
        logits: largest difference of a logit of the answer's first token, for equal pixels.
        largest: largest logit.
    """

    ids: bool
    pixels: float
    logits: float
    largest: float

    @property
    def equal(self) -> bool:
        """Whether the differences are explained by rounding."""
        return self.ids and self.pixels <= 1.01 and self.logits <= CLOSE * self.largest

    def __str__(self) -> str:
        ids = "equal token ids" if self.ids else "DIFFERENT token ids"
        return (
            f"{ids}, pixels within {self.pixels:.2g}/255, logits within {self.logits:.2g} of at most {self.largest:.3g}"
        )


@torch.no_grad()
def compare(checkpoint: str, folder: Path) -> Difference:
    """Compare a saved model with its export, both in float32, one after the other."""
    generator = np.random.default_rng(0)
    sizes = [(40 + 60 * number, 100, 3) for number in range(len(QUESTIONS))]
    images = [Image.fromarray(generator.integers(0, 256, size, np.uint8)) for size in sizes]
    ours, std = _ours(checkpoint, images)
    gc.collect()
    theirs = _theirs(folder, images, [one.pixels for one in ours])
    pairs = list(zip(ours, theirs, strict=True))
    return Difference(
        ids=all(one.ids == other.ids for one, other in pairs),
        pixels=max(float(((one.pixels - other.pixels).abs() * std).max()) * 255 for one, other in pairs),
        logits=max(float((one.logits - other.logits).abs().max()) for one, other in pairs),
        largest=max(float(one.logits.abs().max()) for one in ours),
    )


def _ours(checkpoint: str, images: list[Image.Image]) -> tuple[list[Sample], Tensor]:
    """Return the samples of a saved model, and the standard deviation that its pixels are divided by."""
    predictor = Predictor.of(load_model(checkpoint, dtype="float32"))
    samples = []
    for image, question in zip(images, QUESTIONS, strict=True):
        example = predictor.asked(image, question)
        document = predictor.processor.encode(example, [None])
        batch = predictor.batch([document])
        last = int((batch["document"][0] >= 0).sum()) - 1
        logits = predictor.model.logits(predictor.model.decode(batch)[:, last])[0]
        samples.append(Sample(list(document.questions[0].prompt), batch["pixel_values"][0], logits))
    return samples, torch.tensor(predictor.processor.images.std)[:, None, None]


def _theirs(folder: Path, images: list[Image.Image], pixels: list[Tensor]) -> list[Sample]:
    """Return the samples of an exported model, with the logits of the given pixels."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **SAFE_WEIGHTS).eval()
    processor = AutoProcessor.from_pretrained(folder, **OWN_CODE)
    samples = []
    for image, question, given in zip(images, QUESTIONS, pixels, strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        inputs = processor(images=image, text=processor.apply_chat_template(chat), return_tensors="pt")
        inputs.pop("labels", None)
        ids = [token for token in inputs["input_ids"][0].tolist() if token != model.config.image_token_id]
        logits = model(**{**inputs, "pixel_values": given[None]}).logits[0, -1]
        samples.append(Sample(ids, inputs["pixel_values"][0], logits))
    return samples
