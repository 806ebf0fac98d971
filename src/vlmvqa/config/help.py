"""The -h page of each script: what it does, examples, its most used keys, and the choices of each group.

A test composes every key that a page shows.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from vlmvqa.paths import CALLED_AS, CONF

WIDTH = 120

TRAIN = """\
Most used, each as key=value:
  what           model=... data=... data.root=/folder      the model; the data set and where its files are
                 experiment=... adapt=lora                 a whole recipe; adapters in place of all weights
                 init_from=runs/base                      continue training a saved model
  where          run.name=vqa run.dir=... hub_id=me/vqa    what the run leaves, and where it is published
                 resume=auto run.overwrite=true            resume; start over
  how long       trainer.num_train_epochs=1 trainer.max_steps=1000 trainer.eval_steps=500
  how            trainer.learning_rate=1e-5 trainer.per_device_train_batch_size=6
                 trainer.gradient_accumulation_steps=10 trainer.bf16=true
                 any of transformers' TrainingArguments, by its own name
  what trains    trainable.vision=none trainable.language=4 learning_rates.vision=1e-6
  less data      data.train_split=train[:10%] data.max_eval_samples=1000
  memory         trainer.activation_checkpointing=true model.dtype=bfloat16 dist=fsdp

More: README.md; docs/scaling.md (many GPUs), docs/finetuning.md (adapters), docs/experiments.md (recipes)."""

EVAL = """\
One of the three:
  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  predictions=answers.jsonl            answers that something else wrote
  compare=[runs/a,runs/b]              two results of the same questions

Most used, each as key=value:
  on what        data=... data.root=/folder split=val      also a slice or a draw: split=val[random:1000]
  how            decoding.num_beams=3 decoding.max_new_tokens=10 batch_size=64
  beside it      blank_images=true variants=true           a control; what other toolkits would print
  where          run.name=scored run.overwrite=true

More: README.md; docs/tasks/ (each benchmark's metric), docs/results.md."""

PREDICT = """\
Most used, each as key=value:
  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  image=photo.jpg                      a file or a folder; give it again for more
  question="what is this?"             give it again for more; each is asked about each image
  questions=questions.txt              a file, one question a line
  decoding.num_beams=3 decoding.max_new_tokens=10
  run.name=asked                       predictions.jsonl goes to runs/asked

More: README.md; docs/api.md (the same from Python)."""

SHOW = """\
Most used, each as key=value:
  sample=3 split=val                   the n-th image of a split
  data=... data.root=/folder           of which data set
  model=... model.attention_pattern=causal  as which model reads it
  run.name=look                        row.png goes to runs/look

More: docs/architecture.md (rows, and who sees whom in them)."""

SERVE = """\
Most used, each as key=value:
  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  compare=runs/other                   another, to see both answer side by side
  browse=runs/demo                     the scored run whose answers are browsed (the checkpoint's own)
  examples=photos                      pictures to pick from: a file, a folder, a list of them
  port=7860 host=127.0.0.1             0.0.0.0: other machines may ask, with token=... (or open=true: without)
  limits.megabytes=10 limits.queue=64 limits.max_batch=16 limits.timeout_s=60

More: docs/serving.md (the API, what is bounded)."""

MERGE = """\
Most used, each as key=value:
  what           models=[runs/a,runs/b] base=runs/base     the tuned models, and what they were tuned from
                 adapter=runs/lora                         or one adapter, added to its base
  where          output=runs/merged run.overwrite=true
  how            method=ties density=0.3 scale=1.0 weights=[0.7,0.3]
                 linear, task_arithmetic, ties, dare_linear, dare_ties, slerp
  scored on      data=... data.root=/folder samples=200

More: docs/merging.md."""

PLAN = """\
All that launch/train.py takes, and:
  plan.gpu=a10g plan.gpus=4            t4, v100_16, a4000, a10g, l4, a100_40, a100_80, h100, h200
  plan.questions_per_image=5.36        of the data set, where it is not known here
  plan.text_tokens=64 plan.answer_tokens=4
  plan.utilisation=0.35                the share of the GPU's rate that training is taken to reach
  verify=true                          three steps on the GPU that is here

More: docs/scaling.md."""

HELM = """\
Most used, each as key=value:
  checkpoint=runs/vqa                  a run's folder, its model/ folder, or a hub id
  predictions=answers.jsonl            in its place: what launch/eval.py wrote about the same questions
  data.root=/data/vqav2 data=gqa       the data set
  max_instances=1000 controls=true     how many questions; blank and shuffled images beside them
  punkt=stand_in                       do without nltk's punkt_tab, where it cannot be fetched
  name=mine run.name=helm              the model's name in HELM's tables; the results' folder

More: docs/helm.md."""

PREPARE = """\
Most used, each as key=value:
  data=... data.root=/folder split=train
  features.dir=/fast/features features.dtype=bfloat16
  pack.dir=/fast/vqav2 check.pictures=true check.dir=runs/check"""

FEATURES = """\
features: run every image of a split through the vision encoder once and keep what comes out.

    python launch/prepare.py features model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2 \\
        features.dir=/fast/features
    python launch/train.py   model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2 \\
        data.feature_cache=/fast/features trainable.vision=none

Training then decodes no picture and runs no encoder; it reads tokens x width x bytes an image. DINOv2-B/14 at 224 in
bfloat16 is 257 x 768 x 2 = 395 kB an image, 33 GB for the 82,783 training images of VQAv2. At 100 images/s training
reads 39 MB/s, at 1,000 images/s 395 MB/s.

It pays      where the encoder is frozen and the run (or a search over runs with the same encoder and pictures) makes
             more than one epoch: n epochs decode and encode once instead of n times. It saves most where decoding and
             encoding are much of a step: few or slow cores, a small language model, few questions an image.
It does not  in a single epoch, which encodes every image once anyway; where the disk reads slower than
             (images/s that training needs) x (bytes an image), unless memory holds the features after the first
             epoch; where the language model takes nearly all of a step's time.
It cannot    where the encoder trains: its features change with every step.

The features are of these weights, transform, image size and dtype alone; training with others is refused. The same
command resumes a run that was killed.

  model=... data=... data.root=/folder split=train         which encoder, which pictures
  features.dir=/fast/features features.overwrite=true      where they go; in place of those of another encoder
  features.dtype=bfloat16 batch_size=64 workers=4          how they are stored and made
  data.on_bad_record=skip                                  leave out pictures that cannot be read
"""

CHECK = """\
check: read the published splits (of drawn and hub data: the training and evaluation splits), count, and name what
cannot be used.

    python launch/prepare.py check data=vqav2 data.root=/data/vqav2
    python launch/prepare.py check data=vqav2 data.root=/data/vqav2 check.pictures=true

Seconds for questions and missing pictures; with check.pictures=true every picture is decoded, which takes minutes. The
table goes to the screen, every problem to check.dir/problems.txt, and the exit status is 1 where a split is incomplete.
"""

DOWNLOAD = """\
download: fetch the benchmark's official archives into data.root/archives and unpack them into data.root.

    python launch/prepare.py download data=gqa data.root=/data/gqa

The same command resumes an interrupted download. Checksums are compared where they
are published. VQAv2 takes 20 GB, COCO captions 19 GB, GQA 22 GB; DocVQA's publisher asks for a registration.
"""

PACK = """\
pack: write a split as parquet files with a row for each image, its picture and all its questions.

    python launch/prepare.py pack  data=vqav2 data.root=/data/vqav2 split=train pack.dir=/fast/vqav2
    python launch/prepare.py pack  data=vqav2 data.root=/data/vqav2 split=val   pack.dir=/fast/vqav2
    python launch/train.py         data=vqav2 data.shards=/fast/vqav2

83 files in place of 82,783 for VQAv2's training images: faster to copy, and to read from a disk on the network.
Pictures are the same to the byte, so training is the same too. A picture is one read of one file.
A slice ('split=train[:10%]') is packed by itself, and read by the same name.
"""

PAGES = {
    "train": TRAIN,
    "eval": EVAL,
    "predict": PREDICT,
    "show": SHOW,
    "serve": SERVE,
    "merge": MERGE,
    "plan": PLAN,
    "helm": HELM,
    "prepare": PREPARE,
    "prepare features": FEATURES,
    "prepare check": CHECK,
    "prepare download": DOWNLOAD,
    "prepare pack": PACK,
}


def page(name: str, script: Path, word: str = "") -> str:
    """Return a script's -h page.

    Args:
        name: the name of its config.
        script: its file, whose docstring the page begins with.
        word: the first argument, which names the job of prepare.py.
    """
    documented = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    shown = PAGES[f"{name} {word}"] if f"{name} {word}" in PAGES else f"{documented}\n\n{PAGES.get(name, '')}"
    choices = "\n".join(_choices(name))
    every = "vlmvqa helm" if name == "helm" else f"python launch/{script.name}"
    more = f"Every setting with its present value: {every} --cfg job"
    text = "\n\n".join([shown.strip(), f"Groups, as group=choice:\n{choices}", more])
    return as_installed(text) if CALLED_AS in os.environ else text


def as_installed(text: str) -> str:
    """Return a page with the commands of the installed package (vlmvqa train); columns stay aligned."""
    lines = []
    for line in text.splitlines():
        new = re.sub(r"\bpython launch/(\w+)\.py", r"vlmvqa \1", line)
        new = re.sub(r"\baccelerate launch launch/(\w+)\.py", r"accelerate launch -m vlmvqa \1", new)
        new = re.sub(r"\bdeepspeed launch/(\w+)\.py", r"deepspeed --module vlmvqa \1", new)
        gap = re.search(r"(?<=\S) {3,}(?=\S)", new)
        if new != line and gap:
            about = new[gap.end() :]
            new = new[: gap.start()].ljust(len(line) - len(about) - 1) + " " + about
        lines.append(new)
    return "\n".join(lines)


def _choices(name: str) -> Iterator[str]:
    """Yield each config group that a script takes, with the names of its files."""
    for group in _groups(name):
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        yield textwrap.fill(names, WIDTH, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)


def _groups(name: str) -> Iterator[str]:
    for entry in yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            yield from entry
        elif (CONF / f"{entry}.yaml").exists() and entry != "hydra_quiet":  # plan takes all that train takes
            yield from _groups(entry)
