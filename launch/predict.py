"""Ask a trained model about pictures.

python launch/predict.py checkpoint=runs/demo image=photo.jpg question="what color is it?" question="how many?"
python launch/predict.py checkpoint=runs/demo image=photos/ questions=questions.txt
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import json

from omegaconf import DictConfig
from tqdm import tqdm

import from_config
from vlmvqa.cli import run
from vlmvqa.config.early_checks import read_questions
from vlmvqa.inference.predictor import load
from vlmvqa.progress import bar


def main(config: DictConfig) -> None:
    images, questions = read_questions(config)
    predictor = load(config.checkpoint)
    predictor.decoding = from_config.decoding(config, predictor.decoding)
    folder = from_config.run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "predictions.jsonl.partial"  # a bad image must not cost the answers of before
    with unfinished.open("w", encoding="utf-8") as file:
        for image in bar(images, doing="asking", unit="images", shown=len(images) > 1):
            answers = predictor.answer(image, questions)
            tqdm.write(str(image))
            for question, answer in zip(questions, answers, strict=True):
                cut = ", cut at decoding.max_new_tokens" if answer.cut else ""
                tqdm.write(f"  {question}  {answer.text}  ({answer.probability:.2f}{cut})")
                record = {"image": str(image), "question": question, "answer": answer.text, "cut": answer.cut}
                file.write(json.dumps({**record, "log_probability": answer.log_probability}) + "\n")
    unfinished.replace(folder / "predictions.jsonl")


if __name__ == "__main__":
    run(main, "predict")
