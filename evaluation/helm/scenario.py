"""HELM's questions: its own sample of a validation split, read from local official files.

HELM's scenarios download the data, also load the training questions, and need every image. These read the validation
questions with `vlmvqa.data`, sample first, and read only the images of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from helm.benchmark.scenarios.scenario import CORRECT_TAG, VALID_SPLIT, Input, Instance, Output, Reference
from helm.benchmark.scenarios.vision_language.gqa_scenario import GQAScenario
from helm.benchmark.scenarios.vision_language.vqa_scenario import VQAScenario
from helm.common.media_object import MediaObject, MultimediaObject

from vlmvqa.data.datasets import gqa, vqav2
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import load_json
from vlmvqa.errors import InputError
from vlmvqa.inference.baselines import grey_image, shuffle_images

IMAGE_MODES = ("real", "blank", "shuffled")


class _LocalSample:
    """A sample of local official files.

    Args:
        root: the folder of the official files, as conf/data/{vqav2,gqa}.yaml list them.
        max_instances: size of the sample; 1,000 for HELM's leaderboards.
        image_mode: `real`, or a control: `blank` (a grey image), `shuffled` (another image of the sample).
        seed: seed of the shuffling.
    """

    def __init__(self, root: str, max_instances: int = 1000, image_mode: str = "real", seed: int = 0) -> None:
        super().__init__()
        self.root, self.split = Path(str(root)), f"val[random:{max_instances}]"
        self.image_mode, self.seed = image_mode, seed


class VQAv2Sample(_LocalSample, VQAScenario):
    """The sample of VQAv2's validation questions that HELM scores; name and metadata are HELM's."""

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the sampled questions in file order, with their own ids."""
        sample = vqav2.read(self.root, self.split)
        return [
            _instance(question.id, [image, _text(question.text)], question.answers)
            for example, image in _with_images(sample, self.image_mode, self.seed, Path(output_path))
            for question in example.questions
        ]


class GQASample(_LocalSample, GQAScenario):
    """The sample of GQA's balanced validation questions.

    As in HELM, the question comes before the image, and both the short and the full answer are references.
    """

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the sampled questions in file order, with their own ids."""
        sample = gqa.read(self.root, self.split)
        sentences = _full_answers(gqa.files(self.root, self.split)[0])
        return [
            _instance(question.id, [_text(question.text), image], (*question.answers, sentences(question)))
            for example, image in _with_images(sample, self.image_mode, self.seed, Path(output_path))
            for question in example.questions
        ]


def _instance(name: int | str, content: Sequence[MediaObject], answers: Sequence[str]) -> Instance:
    references = [Reference(Output(text=answer), tags=[CORRECT_TAG]) for answer in answers]
    return Instance(Input(multimedia_content=MultimediaObject(list(content))), references, VALID_SPLIT, id=str(name))


def _text(text: str) -> MediaObject:
    return MediaObject(text=text, content_type="text/plain")


def _with_images(
    examples: Sequence[Example], mode: str, seed: int, folder: Path
) -> Iterator[tuple[Example, MediaObject]]:
    """Yield each example with the image that is shown for it.

    Args:
        folder: HELM's folder of this scenario, the only one from which its pages show images.
    """
    if mode not in IMAGE_MODES:
        raise InputError(f"image_mode={mode} is unknown; use {', '.join(IMAGE_MODES)}")
    if mode == "blank":
        folder.mkdir(parents=True, exist_ok=True)
        grey = folder / "grey.png"
        if not grey.exists():
            grey_image().save(grey)
        for example in examples:
            yield example, MediaObject(location=str(grey), content_type="image/png")
        return
    shown = shuffle_images(examples, seed) if mode == "shuffled" else examples
    if shown is None:
        raise InputError("one image cannot be shuffled; raise max_instances")
    for example, other in zip(examples, shown, strict=True):
        assert isinstance(other.image, Path)
        yield example, MediaObject(location=str(_link(other.image, folder)), content_type="image/jpeg")


def _link(image: Path, folder: Path) -> Path:
    """Return a link to the image, or the image itself if the file system has no links."""
    real = image.resolve()
    link = folder / blake2b(str(real).encode(), digest_size=8).hexdigest() / image.name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real)
    except FileExistsError:
        pass
    except OSError:
        return real
    return link


def _full_answers(path: Path) -> Callable[[Question], str]:
    """Return a function that finds the full answer, which `gqa.read` drops because GQA's metric ignores it."""
    records = load_json(path)

    def find(question: Question) -> str:
        found = records[question.id].get("fullAnswer")
        if not isinstance(found, str):
            raise InputError(f"{path}, question {question.id}: it has no 'fullAnswer', which HELM also accepts")
        return found

    return find
