"""The pages' commands and lines of Python, as they stand there, for fewer pictures and steps.

Where a page names Gemma 2's weights or a benchmark's files, tiny models of the same classes and drawn files take their
place; a run that a page only names is the demo's, which is trained for two steps here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.end_to_end.scripts import LONGER, SHAPES, call, done, predictions
from tests.pages import PAGES, Block, blocks, script
from vlmvqa.extras.synthetic import coco_captions as synthetic_coco_captions
from vlmvqa.extras.synthetic import docvqa as synthetic_docvqa
from vlmvqa.extras.synthetic import gqa as synthetic_gqa
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2

HERE = ("train", "eval", "predict", "show", "prepare", "merge")
# Commands that another test runs, by what is found in them.
BY_OTHERS = {
    r"^make demo": "tests/end_to_end/test_demo.py",
    r"^make (test|test-slow|test-all|test-gpu|coverage|lock)\b": "Makefile",  # the first is what runs this
    r"^make docs": "tests/unit/test_docs_site.py",
    r"^vlmvqa helm ": "tests/end_to_end/test_helm.py",
    r"lmms-eval |lmms_eval |compare_scores .*samples": "tests/end_to_end/test_lmms_eval.py",
    r"vlmevalkit_adapter\.run|compare_scores .*results": "tests/end_to_end/test_vlmevalkit.py",
    r"^make test-harnesses": ".ci/run",
    r"launch/plan\.py": "tests/unit/test_planner.py",  # at real size
    r"launch/study\.py": "tests/end_to_end/test_study.py",
    r"launch/sweep\.py": "tests/end_to_end/test_sweep_search.py",
    r"launch/export\.py": "tests/end_to_end/test_export.py",
    r"launch/verify\.py": "tests/end_to_end/test_verify.py",
    r"bench\.gpu .*--size tiny": "tests/unit/test_bench_gpu.py",
    r"smoke=": "tests/end_to_end/test_experiments.py",
    r"bench\.overhead": "tests/unit/test_bench.py",
    r"launch/serve\.py|^curl |bench\.serving|^pip install": "tests/end_to_end/test_serve.py",
    r"--cfg job": "tests/unit/test_config.py",
}
# In a copy of the project: test_docs_extending.py; its examples one after the other: tests/unit/test_api.py.
ELSEWHERE = ("extending", "api", "serving")  # the last: test_serve.py, test_serve_openai.py
DRAWN = {"vqav2": synthetic_vqav2, "docvqa": synthetic_docvqa, "gqa": synthetic_gqa, "coco": synthetic_coco_captions}
FEW = {"train_images": 8, "val_images": 6}
LANGUAGE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TINY_MODEL = (
    "model.language.name=gemma2",
    "model.language.weights=random",
    "model.language.tokenizer=trained",
    *(f"model.language.overrides.{key}={value}" for key, value in LANGUAGE.items()),
    "model.vision.weights=random",
    "model.vision.image_size=28",
    *(f"model.vision.overrides.{key}" for key in ("embed_dim=32", "depth=1", "num_heads=2")),
)
SHORT = ("trainer.max_steps=2", "trainer.use_cpu=true", "trainer.eval_strategy=no", "trainer.report_to=none",
         "trainer.dataloader_num_workers=0")  # fmt: skip


def is_run_here(command: str) -> bool:
    return bool(re.match(r"python launch/", command)) and script(command) in HERE and not by_others(command)


def by_others(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in BY_OTHERS)


def run_here(page: Path) -> list[Block]:
    runnable = [block for block in blocks(page) if block.can_be_run and page.stem not in ELSEWHERE]
    return [
        block
        for block in runnable
        if (block.language == "bash" and any(map(is_run_here, block.commands)))
        or (block.language == "python" and not block.excerpt_of)
    ]


class Home:
    """A folder in which what the pages name exists: runs/demo, data/shapes, photo.jpg, mine, /data/...

    A command that stands on several pages is run once, unless another one has made its run anew since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, str] = {}
        run = (f"run.dir={folder}/runs/demo", f"data.root={folder}/data/shapes", *LONGER, *SHORT)
        done(call("train", *run))
        for picture in ("photo.jpg", "page.png"):
            Image.new("RGB", (60, 40), "red").save(folder / picture)
        for name, source in DRAWN.items():
            source.write(folder / name, **FEW)
        self._test_split(folder / "vqav2")
        self._mine(folder / "mine")
        shutil.copytree(folder / "mine", folder / "mine_elsewhere")

    def run(self, command: str) -> None:
        name = script(command)
        words = shlex.split(re.sub(r"/data/(\w+)", lambda found: str(self.folder / self._root(found[1])), command))[2:]
        given = dict(word.split("=", 1) for word in words if "=" in word)
        target = given.get("run.name") or given.get("output") or name
        if self.made.get(target) == command:
            return
        self.provide(" ".join(word for word in words if not word.startswith("output=")))
        done(call(name, *words, *self.fewer(name, given)))
        self.made[target] = command

    def provide(self, text: str) -> None:
        """The demo's run in the place of those that are named and were not made."""
        for run in re.findall(r"runs/([\w-]+)", text):
            if not (self.folder / "runs" / run).exists():
                shutil.copytree(self.folder / "runs" / "demo", self.folder / "runs" / run)

    def fewer(self, name: str, given: dict[str, str]) -> list[str]:
        """What makes it quick, and lets it be run twice."""
        drawn = {key.removesuffix("synthetic") for key, value in given.items() if key.endswith("synthetic")}
        shapes_are_read = given.get("data", "shapes") == "shapes" and name in ("train", "eval", "show", "prepare")
        drawn |= {"data."} if shapes_are_read and "compare" not in given else set()
        own = drawn == {"data."} and given.get("data", "shapes") == "shapes"  # data/shapes is there, with other sizes
        few = [*SHAPES] if own else [f"{data}options={{train_images:8,val_images:6}}" for data in sorted(drawn)]
        if name == "train":
            saved = any(key.startswith("init_from") for key in given) or given.get("model", "").startswith("tiny_")
            few += [*([] if saved else TINY_MODEL), *SHORT]
        if name in ("train", "eval", "merge") and "resume" not in given:
            few += ["run.overwrite=true"]
        return few

    def _root(self, name: str) -> str:
        return "mine_elsewhere" if name == "mine" else name

    def _test_split(self, root: Path) -> None:
        (root / "test2015").mkdir()
        for picture in (root / "val2014").iterdir():
            shutil.copy(picture, root / "test2015" / picture.name.replace("val2014", "test2015"))
        names = (f"v2_OpenEnded_mscoco_{subset}_questions.json" for subset in ("val2014", "test-dev2015"))
        shutil.copy(*(root / name for name in names))

    def _mine(self, root: Path) -> None:
        """The record that the README shows, with its picture."""
        (line,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "json"]
        path = root / json.loads(line)["image"]
        path.parent.mkdir(parents=True)
        Image.new("RGB", (60, 40), "red").save(path)
        for split in ("train", "val"):
            (root / f"{split}.jsonl").write_text(line + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def tier(page: Path) -> list[pytest.MarkDecorator]:
    return [] if page.stem == "README" else [pytest.mark.slow]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=tier(page), id=page.stem) for page in PAGES if run_here(page)]
)
def test_what_a_page_says_works(
    page: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block after block, as a reader copies them."""
    monkeypatch.chdir(home.folder)
    if page.stem == "quickstart":
        shutil.rmtree("mine")  # the page makes it
    for block in run_here(page):
        if block.language == "python":
            home.provide(block.text)
            exec(compile(block.text, str(block), "exec"), {})
            printed = capsys.readouterr().out
            assert printed or "print(" not in block.text, block
            continue
        for command in filter(is_run_here, block.commands):
            home.run(command)
    if page.stem == "README":
        assert len(predictions(Path("runs/predict"))) == 2  # of the last command that asks
    if page.stem == "training":
        (first, *_) = json.loads(Path("runs/test-dev/submission.json").read_text())
        assert {"question_id", "answer"} == first.keys()
    if page.stem == "quickstart":
        lines = [json.loads(line) for line in Path("mine/train.jsonl").read_text().splitlines()]
        assert {line["answers"][0] for line in lines} == {"tomato", "lime", "plum", "lemon"}
