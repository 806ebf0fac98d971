"""Score a model or its answers on a split; on all GPUs of a machine with `accelerate launch launch/eval.py ...`.

python launch/eval.py checkpoint=runs/demo data=shapes split=val
python launch/eval.py checkpoint=runs/vqa data=vqav2 data.root=/data/vqav2 split=val[:10%] decoding.num_beams=3
python launch/eval.py predictions=answers.jsonl data=gqa data.root=/data/gqa split=testdev
python launch/eval.py compare=[runs/eval-one,runs/eval-two]

The same command resumes a run that was killed.
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.config.inference_schema import EvalConfig
    from vlmvqa.inference.run import evaluate_run

if __name__ == "__main__":
    cli.run("eval", EvalConfig, evaluate_run)
