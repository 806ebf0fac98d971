"""Ask a trained model about images.

python launch/predict.py checkpoint=runs/demo image=photo.jpg question="what color is it?" question="how many?"
python launch/predict.py checkpoint=runs/demo image=photos/ questions=questions.txt
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    import json

    from tqdm import tqdm

    from vlmvqa.config.inference_schema import PredictConfig, override_decoding
    from vlmvqa.inference.command_line import read_questions
    from vlmvqa.inference.predictor import load
    from vlmvqa.ranks import bar


def predict(config: PredictConfig) -> None:
    """Print every answer, and write all of them to `predictions.jsonl` in the run's folder."""
    images, questions = read_questions(config.image, config.question, config.questions)
    predictor = load(config.checkpoint, dtype=config.dtype)
    predictor.decoding = override_decoding(predictor.decoding, config.decoding, config.given)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "predictions.jsonl.partial"  # an unreadable image must not lose the answers before it
    with unfinished.open("w", encoding="utf-8") as file:
        for image in bar(images, doing="answering", unit="images", shown=len(images) > 1):
            answers = predictor.answer(image, questions)
            tqdm.write(str(image))
            for question, answer in zip(questions, answers, strict=True):
                cut = ", cut at decoding.max_new_tokens" if answer.cut else ""
                tqdm.write(f"  {question}  {answer.text}  ({answer.probability:.2f}{cut})")
                record = {"image": str(image), "question": question, "answer": answer.text, "cut": answer.cut}
                file.write(json.dumps({**record, "log_probability": answer.log_probability}) + "\n")
    unfinished.replace(folder / "predictions.jsonl")


if __name__ == "__main__":
    cli.run("predict", PredictConfig, predict)
