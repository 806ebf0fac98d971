"""HELM's questions: ours are those of HELM's own scenarios, taken from files that are here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("helm", reason="crfm-helm is an extra: pip install 'vlmvqa[helm]'")

from helm.benchmark.adaptation.adapters.multimodal.generation_multimodal_adapter import GenerationMultimodalAdapter
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.run_specs.vlm_run_specs import get_gqa_spec, get_vqa_spec
from helm.benchmark.runner import downsample_eval_instances
from helm.benchmark.scenarios.scenario import EVAL_SPLITS, Instance, with_instance_ids
from helm.benchmark.scenarios.vision_language.gqa_scenario import GQAScenario
from helm.benchmark.scenarios.vision_language.vqa_scenario import VQAScenario

from tests.conftest import ROOT
from vlmvqa.data.datasets import vqav2
from vlmvqa.errors import InputError
from vlmvqa.evaluation.helm.client import HelmQuestion
from vlmvqa.evaluation.helm.run_specs import gqa as gqa_entry
from vlmvqa.evaluation.helm.run_specs import vqav2 as vqav2_entry
from vlmvqa.evaluation.helm.scenario import GQASample, VQAv2Sample
from vlmvqa.extras.synthetic import gqa as synthetic_gqa
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.inference.baselines import shuffle_images


@pytest.fixture(scope="module")
def vqa_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_vqav2.write(
        tmp_path_factory.mktemp("vqa") / "vqa", train_images=3, val_images=20, questions_per_image=5
    )


@pytest.fixture(scope="module")
def gqa_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_gqa.write(tmp_path_factory.mktemp("gqa") / "gqa", train_images=20, val_images=20)


@pytest.fixture
def helms_vqa(tmp_path: Path, vqa_root: Path) -> Path:
    """The folder in which HELM's own scenario finds everything fetched."""
    for split, name in (("train", "train2014"), ("valid", "val2014")):
        folder = tmp_path / "helms" / split
        folder.mkdir(parents=True)
        shutil.copy(vqa_root / f"v2_OpenEnded_mscoco_{name}_questions.json", folder / "questions.json")
        shutil.copy(vqa_root / f"v2_mscoco_{name}_annotations.json", folder / "answers.json")
        (folder / "images").symlink_to(vqa_root / name)
    return tmp_path / "helms"


@pytest.fixture
def helms_gqa(tmp_path: Path, gqa_root: Path) -> Path:
    folder = tmp_path / "helms"
    (folder / "questions").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(gqa_root / f"{split}_balanced_questions.json", folder / "questions")
    (folder / "images").symlink_to(gqa_root / "images")
    return folder


def content(instance: Instance) -> tuple[Any, ...]:
    """What is asked, in which order and about which file, and what is right."""
    objects = instance.input.multimedia_content.media_objects
    said = [one.text if one.is_type("text") else Path(one.location).resolve() for one in objects]
    return (instance.split, *said, *(reference.output.text for reference in instance.all_correct_references))


def drawn_by_helm(scenario: Any, folder: Path, number: int) -> list[Instance]:
    """As helm-run does for `--max-eval-instances`."""
    instances = with_instance_ids(scenario.get_instances(str(folder)))
    return [one for one in downsample_eval_instances(instances, number, EVAL_SPLITS) if one.split in EVAL_SPLITS]


@pytest.mark.parametrize("number", [1, 7, 60])
def test_vqav2s_questions_are_those_that_helm_draws(
    number: int, helms_vqa: Path, vqa_root: Path, tmp_path: Path
) -> None:
    helms = drawn_by_helm(VQAScenario(), helms_vqa, number)
    ours = VQAv2Sample(str(vqa_root), number).get_instances(str(tmp_path / "out"))
    assert Counter(map(content, ours)) == Counter(map(content, helms)) and len(ours) == number
    again = drawn_by_helm(VQAv2Sample(str(vqa_root), number), tmp_path / "out", number)
    assert [content(one) for one in again] == [content(one) for one in ours]  # HELM draws no second time
    assert len({one.id for one in ours}) == number


@pytest.mark.parametrize("number", [1, 40])
def test_gqas_questions_are_those_that_helm_draws(number: int, helms_gqa: Path, gqa_root: Path, tmp_path: Path) -> None:
    helms = drawn_by_helm(GQAScenario(), helms_gqa, number)
    ours = GQASample(str(gqa_root), number).get_instances(str(tmp_path / "out"))
    assert Counter(map(content, ours)) == Counter(map(content, helms)) and len(ours) == number


@pytest.mark.parametrize(("ours", "helms"), [(vqav2_entry, get_vqa_spec), (gqa_entry, get_gqa_spec)])
def test_a_run_entry_is_helms_own_but_for_the_questions(ours: Any, helms: Any) -> None:
    entry, own = ours("/data"), helms()
    assert entry.adapter_spec == own.adapter_spec
    assert entry.metric_specs[:-1] == own.metric_specs and "accuracy" in entry.metric_specs[-1].args["name"]


def test_only_the_images_that_were_drawn_are_needed(vqa_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(vqa_root, tmp_path / "few"))
    kept = {example.image for example in vqav2.read(root, "val[random:5]")}
    for path in (root / "val2014").iterdir():
        if path not in kept:
            path.unlink()
    assert len(VQAv2Sample(str(root), 5).get_instances(str(tmp_path / "out"))) == 5


def test_controls_show_one_grey_or_the_picture_of_another_question(vqa_root: Path, tmp_path: Path) -> None:
    def shown(mode: str) -> list[tuple[str, Path]]:
        found = VQAv2Sample(str(vqa_root), 40, mode, seed=3).get_instances(str(tmp_path / mode))
        return [(one.id, Path(one.input.multimedia_content.media_objects[0].location).resolve()) for one in found]

    real, blank, shuffled = shown("real"), shown("blank"), shown("shuffled")
    assert [name for name, _ in real] == [name for name, _ in blank] == [name for name, _ in shuffled]
    (grey,) = {path for _, path in blank}
    with Image.open(grey) as picture:
        assert len(picture.getcolors()) == 1
    # The same pairs as launch/eval.py makes, so that their scores can be compared.
    expected = shuffle_images(vqav2.read(vqa_root, "val[random:40]"), 3)
    assert expected is not None
    assert [path for _, path in shuffled] == [
        example.image.resolve() for example in expected for _ in example.questions if isinstance(example.image, Path)
    ]
    assert all(one != other for one, other in zip(real, shuffled, strict=True))


def test_an_unknown_image_mode_and_one_picture_alone_are_refused(vqa_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_mode=grey is unknown; use real, blank, shuffled"):
        VQAv2Sample(str(vqa_root), 5, "grey").get_instances(str(tmp_path))
    with pytest.raises(InputError, match="one image cannot be shuffled"):
        VQAv2Sample(str(vqa_root), 1, "shuffled").get_instances(str(tmp_path))


@pytest.mark.parametrize("source", ["vqav2", "gqa"])
def test_helms_prompt_is_taken_apart(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Built by HELM's own adapter, whichever of image and question it puts first."""
    root = request.getfixturevalue({"vqav2": "vqa_root", "gqa": "gqa_root"}[source])
    scenario = {"vqav2": VQAv2Sample, "gqa": GQASample}[source](str(root), 10)
    spec = {"vqav2": get_vqa_spec, "gqa": get_gqa_spec}[source]().adapter_spec
    register_model_deployment(ModelDeployment("vlmvqa/none", ClientSpec("none")))
    adapter = GenerationMultimodalAdapter(replace(spec, model_deployment="vlmvqa/none"), None)
    for instance in scenario.get_instances(str(tmp_path)):
        (state,) = adapter.generate_requests(instance, 0, [])
        objects = instance.input.multimedia_content.media_objects
        texts = [one.text for one in objects if one.is_type("text")]
        pictures = [Path(one.location) for one in objects if not one.is_type("text")]
        asked = HelmQuestion.of(state.request.multimodal_prompt)
        assert [asked.question, asked.image, asked.instructions] == [*texts, *pictures, spec.instructions]


FULL = """
import sys
from pathlib import Path
from vlmvqa.evaluation.helm.scenario import VQAv2Sample
print(len(VQAv2Sample(sys.argv[1]).get_instances(sys.argv[2])))
memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(memory.split()[1]) * 1024 / 1e9)
"""


@pytest.mark.long
def test_a_thousand_of_vqav2s_full_size(tmp_path: Path) -> None:
    """Of 214,354 questions about 40,504 images, 1,000 under 2 GB; only the images that are needed are there."""
    from tests.unit.test_million import generate

    root = generate(tmp_path / "vqav2", 214_354, 40_504)
    for name in ("v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json", "{}"):
        (root / name.format("train2014")).rename(root / name.format("val2014"))
    for path in list((root / "val2014").iterdir()):
        path.rename(path.with_name(path.name.replace("train2014", "val2014")))
    drawn = {example.image for example in vqav2.read(root, "val[random:1000]")}
    for path in list((root / "val2014").iterdir()):
        if path not in drawn:
            path.unlink()
    started = time.perf_counter()
    command = [sys.executable, "-c", FULL, str(root), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    number, gigabytes = done.stdout.split()
    print(f"{time.perf_counter() - started:.1f} s, {gigabytes} GB")
    assert number == "1000" and float(gigabytes) < 2
