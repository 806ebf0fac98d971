"""Ask a trained model about pictures.

python launch/predict.py checkpoint=runs/demo image=photo.jpg question="what color is it?" question="how many?"
python launch/predict.py checkpoint=runs/demo image=photos/ questions=questions.txt
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import json
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

import from_config
from command_line import run
from vlmvqa.errors import InputError
from vlmvqa.inference.predict import load
from vlmvqa.progress import bar


def main(config: DictConfig) -> None:
    images = [path for given in config.image for path in _images(Path(given).expanduser())]
    questions = [*config.question, *_read_questions(config.questions)]
    if not images or not questions:
        raise InputError("nothing to ask: give image=... (a file or folder) and question=... or questions=... (a file)")
    predictor = load(config.checkpoint)
    predictor.decoding = from_config.decoding(config, predictor.decoding)
    folder = from_config.run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "predictions.jsonl.partial"  # a bad image must not cost the answers of before
    with unfinished.open("w", encoding="utf-8") as file:
        for image in bar(images, doing="asking", unit="images", shown=len(images) > 1):
            tqdm.write(str(image))
            for question, answer in zip(questions, predictor.answer(image, questions), strict=True):
                cut = ", cut at decoding.max_new_tokens" if answer.cut else ""
                tqdm.write(f"  {question}  {answer.text}  ({answer.probability:.2f}{cut})")
                record = {"image": str(image), "question": question, "answer": answer.text, "cut": answer.cut}
                file.write(json.dumps({**record, "log_probability": answer.log_probability}) + "\n")
    unfinished.replace(folder / "predictions.jsonl")


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]  # whether it is a picture is said when it is read
    endings = Image.registered_extensions()
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
    if not found:
        raise InputError(f"{path} holds no image files")
    return found


def _read_questions(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"questions={path} cannot be read as text, one question a line ({error})") from error
    return [line.strip() for line in lines if line.strip()]


if __name__ == "__main__":
    run(main, "predict")
