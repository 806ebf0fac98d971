"""HELM's questions: its own draw of a validation split, from the official files that are here already.

HELM's scenarios fetch the data, load the training questions too, and want every image. These read the validation
questions with `vlmvqa.data`, draw first, and touch only the images that were drawn.
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


class VQAv2Drawn(VQAScenario):
    """VQAv2's validation questions, as many as HELM draws; name and metadata are HELM's.

    Args:
        root: the folder of the official files, as conf/data/vqav2.yaml lists them.
        max_instances: how many of the split HELM draws: 1,000 for its leaderboards.
        image_mode: `real`, or a control: `blank` (one grey), `shuffled` (each question about another drawn image).
        seed: of the shuffling.
    """

    def __init__(self, root: str, max_instances: int = 1000, image_mode: str = "real", seed: int = 0) -> None:
        super().__init__()
        self.root, self.max_instances, self.image_mode, self.seed = Path(str(root)), max_instances, image_mode, seed

    def get_instances(self, output_path: str) -> list[Instance]:
        """The drawn questions in file order, each under its own id."""
        drawn = vqav2.read(self.root, f"val[random:{self.max_instances}]")
        return [
            _instance(question.id, [picture, _text(question.text)], question.answers)
            for example, picture in _pictures(drawn, self.image_mode, self.seed, Path(output_path))
            for question in example.questions
        ]


class GQADrawn(GQAScenario):
    """GQA's balanced validation questions, the same way: `root` as conf/data/gqa.yaml lists it.

    As in HELM, the question comes before the image, and an answer is right as a word and as a sentence.
    """

    def __init__(self, root: str, max_instances: int = 1000, image_mode: str = "real", seed: int = 0) -> None:
        super().__init__()
        self.root, self.max_instances, self.image_mode, self.seed = Path(str(root)), max_instances, image_mode, seed

    def get_instances(self, output_path: str) -> list[Instance]:
        """The drawn questions in file order, each under its own id."""
        split = f"val[random:{self.max_instances}]"
        sentences = _full_answers(gqa.files(self.root, split)[0])
        return [
            _instance(question.id, [_text(question.text), picture], (*question.answers, sentences(question)))
            for example, picture in _pictures(gqa.read(self.root, split), self.image_mode, self.seed, Path(output_path))
            for question in example.questions
        ]


def _instance(name: int | str, content: Sequence[MediaObject], answers: Sequence[str]) -> Instance:
    references = [Reference(Output(text=answer), tags=[CORRECT_TAG]) for answer in answers]
    return Instance(Input(multimedia_content=MultimediaObject(list(content))), references, VALID_SPLIT, id=str(name))


def _text(text: str) -> MediaObject:
    return MediaObject(text=text, content_type="text/plain")


def _pictures(examples: Sequence[Example], mode: str, seed: int, folder: Path) -> Iterator[tuple[Example, MediaObject]]:
    """Each example with the picture that is shown for it.

    Args:
        folder: HELM's, of this scenario; its pages show pictures from there, and from nowhere else.
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
        raise InputError("one image cannot be shuffled; draw more questions")
    for example, other in zip(examples, shown, strict=True):
        assert isinstance(other.image, Path)
        yield example, MediaObject(location=str(_link(other.image, folder)), content_type="image/jpeg")


def _link(picture: Path, folder: Path) -> Path:
    """A link to the picture, or the picture itself where links cannot be made."""
    real = picture.resolve()
    link = folder / blake2b(str(real).encode(), digest_size=8).hexdigest() / picture.name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real)
    except FileExistsError:
        pass
    except OSError:
        return real
    return link


def _full_answers(path: Path) -> Callable[[Question], str]:
    """The answer as a sentence, which GQA's own metric does not look at, and so its reader drops."""
    records = load_json(path)

    def find(question: Question) -> str:
        found = records[question.id].get("fullAnswer")
        if not isinstance(found, str):
            raise InputError(f"{path}, question {question.id}: it has no 'fullAnswer', which HELM counts as right too")
        return found

    return find
