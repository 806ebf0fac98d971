"""The -h page of each script: purpose, examples, most used keys, and the choices of each group.

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
  what           model=... data=... data.root=/folder      the model; the dataset and the folder of its files
                 experiment=... adapt=lora                 a complete recipe; train adapters, not all weights
                 init_from=runs/base                       continue training a saved model
  where          run.name=vqa run.dir=... hub_id=me/vqa    the run's folder; where the model is uploaded
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
  predictions=answers.jsonl            answers that another program wrote
  compare=[runs/a,runs/b]              two results on the same questions

Most used, each as key=value:
  on what        data=... data.root=/folder split=val      also a slice or a sample: split=val[random:1000]
  how            decoding.num_beams=3 decoding.max_new_tokens=10 batch_size=64 dtype=float32
  also           blank_images=true variants=true           a control; the scores other toolkits print
  where          run.name=scored run.overwrite=true

More: README.md; docs/tasks/ (each benchmark's metric), docs/results.md."""

PREDICT = """\
Most used, each as key=value:
  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  image=photo.jpg                      a file or a folder; give it again for more
  question="what is this?"             give it again for more; each is asked about every image
  questions=questions.txt              a file, one question a line
  decoding.num_beams=3 decoding.max_new_tokens=10 dtype=float32
  run.name=asked                       predictions.jsonl goes to runs/asked

More: README.md; docs/api.md (the same from Python)."""

SHOW = """\
Most used, each as key=value:
  sample=3 split=val                   the n-th image of a split
  data=... data.root=/folder           the dataset
  model=... model.attention_pattern=causal  the model that reads it
  run.name=look                        row.png goes to runs/look

More: docs/architecture.md (rows, and which tokens attend to which)."""

SERVE = """\
Most used, each as key=value:
  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  compare=runs/other                   a second model, to compare both answers
  browse=runs/demo                     the scored run whose answers are browsed (default: the checkpoint's)
  examples=photos                      example images: a file, a folder, or a list of them
  decoding.num_beams=3 dtype=float32   how the models answer
  port=7860 host=127.0.0.1             0.0.0.0: reachable from other machines, with token=... (or open=true)
  limits.megabytes=10 limits.queue=64 limits.max_batch=16 limits.timeout_s=60

More: docs/serving.md (the API and its limits)."""

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
All settings of launch/train.py, and:
  plan.gpu=a10g plan.gpus=4            t4, v100_16, a4000, a10g, l4, a100_40, a100_80, h100, h200
  plan.questions_per_image=5.36        of the dataset, if it is not known here
  plan.text_tokens=64 plan.answer_tokens=4
  plan.efficiency=0.5 plan.overlap=0.5 plan.link=10    assumed shares of peak FLOP/s and of hidden sending, GB/s
  verify=true                          run three steps on this machine's GPU

More: docs/scaling.md."""

STUDY = """\
Most used, each as key=value:
  study=mask                           the arms: a file of conf/study
  seeds=[0,1,2] size=smoke             one run per arm and seed; smoke: minutes on two cores
  base=data=vqav2 base=data.root=/data/vqav2    settings of launch/train.py for all arms, each with base=
  arms=[causal,prefix_lm]              only these, and the baseline
  runs={other:[runs/a,runs/b]}         finished runs from elsewhere as another arm
  only_report=true                     train nothing, compare what is finished

More: docs/studies.md."""

SWEEP = """\
Most used, each as key=value:
  sweep=learning_rate trials=20        the search space: a file of conf/sweep; number of trials in total
  size=smoke                           minutes on two cores
  base=data=vqav2 base=data.root=/data/vqav2    settings of launch/train.py for all trials, each with base=
  sweep.space.trainer.learning_rate.high=1e-3   another range
  sweep.pruning=null                   train all trials to their end
  only_report=true                     train nothing, report the trials that have ended

More: docs/studies.md."""

EXPORT = """\
Writes a folder that transformers loads without vlmvqa, loads it again and compares both models on random images.

  checkpoint=runs/demo                 a run's folder, its model/ folder, or a hub id
  format=paligemma                     for prefix_lm attention, a linear projector and Gemma or Gemma 2
  output=exported/demo                 a new folder
  run.overwrite=true                   replace the folder

Any other model loads with transformers after `import vlmvqa.hf`. More: docs/ecosystem.md."""

VERIFY = """\
Compares the vision encoder with timm's and the language model with transformers', on the same weights.

  model=dinov2_gemma2_2b               any model with weights; on a GPU if there is one, in float32
  model.language.name=/folder          weights in a folder
  model.vision.weights=/file.safetensors

More: docs/training.md."""

HELM = """\
Most used, each as key=value:
  checkpoint=runs/vqa                  a run's folder, its model/ folder, or a hub id
  predictions=answers.jsonl            instead: what launch/eval.py wrote about the same questions
  data.root=/data/vqav2 data=gqa       the dataset
  max_instances=1000 controls=true     how many questions; also with blank and shuffled images
  punkt=stand_in                       do without nltk's punkt_tab, if it cannot be downloaded
  name=mine run.name=helm              the model's name in HELM's tables; the results' folder

More: docs/helm.md."""

PREPARE = """\
Most used, each as key=value:
  data=... data.root=/folder split=train
  features.dir=/fast/features features.dtype=bfloat16
  pack.dir=/fast/vqav2 check.images=true check.dir=runs/check harness.dir=harness/vqav2"""

FEATURES = """\
features: run every image of a split through the vision encoder once and cache the output.

    python launch/prepare.py features model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2 \\
        features.dir=/fast/features
    python launch/train.py   model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2 \\
        data.feature_cache=/fast/features trainable.vision=none

Training then decodes no image and runs no encoder; it reads tokens x width x bytes per image: 395 kB for DINOv2-B/14 at
224 in bfloat16, 33 GB for the 82,783 training images of VQAv2. It pays off where a frozen encoder would see each image
more than once, and the disk is fast enough (docs/fast.md). It cannot be used where the encoder trains.

The features are valid only for these weights, transform, image size and dtype; training with others is refused. The
same command resumes a run that was killed.

  model=... data=... data.root=/folder split=train         the encoder and the images
  features.dir=/fast/features features.overwrite=true      the folder; replace the features of another encoder
  features.dtype=bfloat16 batch_size=64 workers=4          how they are stored and computed
  data.on_bad_record=skip                                  skip images that cannot be read
"""

CHECK = """\
check: read the published splits (of generated and hub data: the training and evaluation splits), count their records,
and list those that cannot be used.

    python launch/prepare.py check data=vqav2 data.root=/data/vqav2
    python launch/prepare.py check data=vqav2 data.root=/data/vqav2 check.images=true

Questions and missing images take seconds; check.images=true decodes every image, which takes minutes. The table is
printed, every problem is written to check.dir/problems.txt, and the exit status is 1 if a split is incomplete.
"""

DOWNLOAD = """\
download: fetch the benchmark's official archives into data.root/archives and unpack them into data.root.

    python launch/prepare.py download data=gqa data.root=/data/gqa

The same command resumes an interrupted download. Published checksums are verified. VQAv2 takes 20 GB, COCO captions
19 GB, GQA 22 GB; DocVQA's publisher requires a registration.
"""

PACK = """\
pack: write a split as parquet files with one row per image, which holds the image and all its questions.

    python launch/prepare.py pack  data=vqav2 data.root=/data/vqav2 split=train pack.dir=/fast/vqav2
    python launch/prepare.py pack  data=vqav2 data.root=/data/vqav2 split=val   pack.dir=/fast/vqav2
    python launch/train.py         data=vqav2 data.shards=/fast/vqav2

83 files instead of 82,783 for VQAv2's training images: faster to copy, and to read from a network disk. The images are
equal byte for byte, so training is the same. Each image is one read of one file. A slice ('split=train[:10%]') is
packed separately and read under the same name.
"""

HARNESS = """\
harness: write the files by which an evaluation harness reads a split, with the images.

    python launch/prepare.py harness data=shapes
    python launch/prepare.py harness data=vqav2 data.root=/data/vqav2 harness.format=vlmevalkit harness.dir=/fast/kit

The task or table is scored as the harness scores the benchmark. Only questions with answers can be written, and only
for the metrics vqa_accuracy, anls, gqa_accuracy and exact_match.

  harness.format=lmms_eval             or vlmevalkit
  split=val data.max_eval_samples=500  the questions (default: data.eval_split)

More: docs/harnesses.md.
"""

PAGES = {
    "train": TRAIN,
    "eval": EVAL,
    "predict": PREDICT,
    "show": SHOW,
    "serve": SERVE,
    "merge": MERGE,
    "plan": PLAN,
    "study": STUDY,
    "sweep": SWEEP,
    "export": EXPORT,
    "verify": VERIFY,
    "helm": HELM,
    "prepare": PREPARE,
    "prepare features": FEATURES,
    "prepare check": CHECK,
    "prepare download": DOWNLOAD,
    "prepare pack": PACK,
    "prepare harness": HARNESS,
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
    more = f"All settings with their values: {every} --cfg job"
    text = "\n\n".join([shown.strip(), f"Groups, as group=choice:\n{choices}", more])
    return as_installed(text) if CALLED_AS in os.environ else text


def as_installed(text: str) -> str:
    """Return a page with the commands of the installed package (vlmvqa train); columns stay aligned."""
    starts = {
        "python": "vlmvqa",
        "accelerate launch": "accelerate launch -m vlmvqa",
        "deepspeed": "deepspeed --module vlmvqa",
    }

    def installed(found: re.Match[str]) -> str:
        command = f"{starts[found[1]]} {found[2]}{found[3]}"
        return command.ljust(len(found[0]) - 1) + " " if found[4] else command

    return re.sub(rf"\b({'|'.join(starts)}) launch/(\w+)\.py(.*?)( {{3,}}|$)", installed, text, flags=re.MULTILINE)


def _choices(name: str) -> Iterator[str]:
    """Yield each config group that a script takes, with the names of its files."""
    for group in _groups(name):
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        yield textwrap.fill(names, WIDTH, initial_indent=f"  {group:<16}", subsequent_indent=" " * 18)


def _groups(name: str) -> Iterator[str]:
    for entry in yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            yield from entry
        elif (CONF / f"{entry}.yaml").exists() and entry != "hydra_quiet":  # plan takes all that train takes
            yield from _groups(entry)
