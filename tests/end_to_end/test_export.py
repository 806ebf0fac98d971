"""launch/export.py: the exported model computes the same under transformers' own classes, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmvqa
from tests import tiny
from tests.conftest import ROOT
from tests.end_to_end.scripts import call, done, sentence
from tests.unit.test_predictor import examples
from vlmvqa.config.schema import RunSettings
from vlmvqa.data.datasets import vqav2
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.export import paligemma
from vlmvqa.extras.export.run import ExportConfig, export
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.build import build
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import ModelSettings, ProjectorSettings

VOCABULARY = 300
QUESTIONS = ["what is it", "the big dog left of it", "is it", "what color is the dog", "of", "it is big big big"]
# Answers questions with transformers alone; any import of the package is an error.
ANSWER = """\
import json, sys
sys.modules["vlmvqa"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, asked = sys.argv[1], json.loads(open(sys.argv[2]).read())
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
answers = []
for start in range(0, len(asked), 20):
    batch = asked[start : start + 20]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in batch]
    images = [[Image.open(path).convert("RGB")] for path, _ in batch]
    prompts = [processor.apply_chat_template(chat) for chat in chats]
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    written = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers += [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
print(json.dumps(answers))
"""


def trained(
    pattern: str = "prefix_lm",
    family: str = "gemma2",
    vision: str = "vit_base_patch14_dinov2.lvd142m",
    overrides: Mapping[str, Any] = tiny.VISION,
    prompt: str = "answer en {question}\n",
    projector: str = "linear",
    resize: str = "squash",
) -> Predictor:
    """Return a model with large random weights, so that softcaps and attention matter."""
    language = {**tiny.FAMILIES[family], "vocab_size": VOCABULARY}
    if family == "gemma2":
        language |= {"sliding_window": 64}  # longer than the rows: beyond it PaliGemma's local layers differ
    settings = ModelSettings(
        vision=VisionSettings(vision, tiny.IMAGE_SIZE, "random", overrides),
        projector=ProjectorSettings(projector),
        language=LanguageSettings(family, "random", language),
        attention_pattern=pattern,
    )
    torch.manual_seed(0)
    vlm = build(settings).eval()
    images = ImageSettings(tiny.IMAGE_SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", resize)
    processor = Processor(train_tokenizer(examples(), VOCABULARY), images, vlm.num_image_tokens, pattern, 40)
    return Predictor(vlm, processor, prompt, settings, GenerationSettings(max_new_tokens=6))


def pictures(folder: Path, count: int) -> list[Path]:
    """Save pictures of different sizes."""
    found = []
    for number in range(count):
        noise = torch.randint(0, 256, (30 + 7 * number, 50, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        found.append(folder / f"{number}.png")
    return found


def answer_elsewhere(folder: Path, asked: Sequence[tuple[Path, str]], scratch: Path) -> list[str]:
    """Answer with transformers alone, in a fresh process."""
    (scratch / "asked.json").write_text(json.dumps([[str(path), text] for path, text in asked]))
    (scratch / "answer.py").write_text(ANSWER)
    command = [sys.executable, str(scratch / "answer.py"), str(folder), str(scratch / "asked.json")]
    ended = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answers: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return answers


ENCODERS: dict[str, dict[str, Any]] = {
    "dinov2": {},
    "without_layer_scale": {
        "vision": "vit_base_patch16_224.augreg_in21k",
        "overrides": {**tiny.VISION, "init_values": None},
    },
    "siglip": {
        "vision": "vit_base_patch16_siglip_224.webli",
        "overrides": {key: value for key, value in tiny.VISION.items() if key != "init_values"},
    },
}


@pytest.mark.parametrize(
    ("encoder", "family"),
    [("dinov2", "gemma2"), ("dinov2", "gemma"), ("without_layer_scale", "gemma"), ("siglip", "gemma2")],
)
def test_the_exported_model_computes_the_same(encoder: str, family: str, tmp_path: Path) -> None:
    ours = trained(family=family, **ENCODERS[encoder])
    ours.save(tmp_path / "saved")
    told = done(call("export", f"checkpoint={tmp_path / 'saved'}", f"output={tmp_path / 'out'}")).out
    assert "compute the same: equal token ids" in told
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["ids"] and record["pixels"] <= 1.01 and record["logits"] <= 1e-5 * max(record["largest"], 1)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    found, expected = [], []
    for path, question in zip(pictures(tmp_path, len(QUESTIONS)), QUESTIONS, strict=True):
        with Image.open(path) as image:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            inputs = processor(images=image, text=processor.apply_chat_template(chat), return_tensors="pt")
        encoded = ours.processor.encode(ours.asked(path, question), [None])
        assert torch.equal(inputs["pixel_values"][0], encoded.images[0])
        prompt = list(encoded.questions[0].prompt)
        image_tokens = [model.config.image_token_id] * ours.processor.num_image_tokens
        assert inputs["input_ids"][0].tolist() == [*image_tokens, *prompt]
        written = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        found.append(processor.batch_decode(written, skip_special_tokens=True)[0].strip())
        expected.append(ours.answer(path, question).text)
    assert found == expected and len(set(found)) >= 2


@pytest.mark.slow
def test_it_loads_without_this_package(tmp_path: Path) -> None:
    """In batches of questions of different lengths; the card's code runs as printed."""
    ours = trained()
    ours.save(tmp_path / "saved")
    done(call("export", f"checkpoint={tmp_path / 'saved'}", f"output={tmp_path / 'out'}"))
    asked = list(zip(pictures(tmp_path, len(QUESTIONS)), QUESTIONS, strict=True))
    assert answer_elsewhere(tmp_path / "out", asked, tmp_path) == [ours.answer(*one).text for one in asked]
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == ours.answer(tmp_path / "photo.jpg", "what is this?").text


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_trained_model_gives_the_same_answers(tmp_path: Path) -> None:
    """The demo with prefix_lm, at least 90 % right: 200 images, at least 20 different answers."""
    run, root = tmp_path / "run", ROOT / "data" / "shapes"
    done(call("train", "model.attention_pattern=prefix_lm", f"data.root={root}", f"run.dir={run}", "report=false"))
    assert json.loads((run / "metrics.json").read_text())["metrics"]["vqa_accuracy"]["overall"] >= 90
    done(call("export", f"checkpoint={run}", f"output={tmp_path / 'out'}"))
    given = vqav2.read(root, "val")[:200]
    asked = [
        (Path(str(example.image)), example.questions[number % len(example.questions)].text)
        for number, example in enumerate(given)
    ]
    ours = vlmvqa.load(run, "cpu")
    answers = [ours.answer(*one).text for one in asked]
    assert len(asked) == 200 and len(set(answers)) >= 20
    assert answer_elsewhere(tmp_path / "out", asked, tmp_path) == answers


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pattern": "blockwise_prefix"}, "model.attention_pattern=blockwise_prefix is not its pattern"),
        ({"family": "llama"}, "its language model, llama, is not Gemma or Gemma 2"),
        ({"projector": "mlp"}, "model.projector.kind=mlp is not linear"),
        ({"prompt": "Question: {question} Answer:"}, "does not end with a newline"),
        ({"resize": "center_crop"}, "data.resize=center_crop is not squash"),
        ({"vision": "vit_base_patch14_reg4_dinov2.lvd142m"}, "its encoder has register tokens"),
        ({"vision": "vit_small_patch16_dinov3.lvd1689m"}, "its encoder is a Eva, not timm's VisionTransformer"),
        ({"vision": "vit_base_patch16_clip_224.openai"}, "its encoder has other norms or activations"),
    ],
)
def test_what_paligemma_cannot_express_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    trained(**options).save(tmp_path / "saved")
    said = sentence(call("export", f"checkpoint={tmp_path / 'saved'}", f"output={tmp_path / 'out'}"))
    assert reason in said and "import vlmvqa.hf" in said and not (tmp_path / "out").exists()


def test_mistakes(tmp_path: Path) -> None:
    trained().save(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    saved = f"checkpoint={tmp_path / 'saved'}"
    assert "is not empty; name a new folder" in sentence(call("export", saved, f"output={tmp_path / 'full'}"))
    assert "format=llava is unknown; use paligemma" in sentence(
        call("export", saved, f"output={tmp_path / 'out'}", "format=llava")
    )
    missing = sentence(call("export", f"checkpoint={tmp_path / 'none'}", f"output={tmp_path / 'out'}"))
    assert "no model at" in missing


def test_weights_that_differ_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is compared with the checkpoint before it gets its name."""
    really = paligemma.weights
    monkeypatch.setattr(
        paligemma,
        "weights",
        lambda model: ((name, weight * (1.01 if "projector" in name else 1)) for name, weight in really(model)),
    )
    trained().save(tmp_path / "saved")
    config = ExportConfig(RunSettings("export", ""), str(tmp_path / "saved"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="differs from checkpoint="):
        export(config)
    assert not (tmp_path / "out").exists()
