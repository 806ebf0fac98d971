"""Merge models that were fine-tuned from the same model into one, without training, on the CPU, in little memory.

python launch/merge.py base=runs/base models=[runs/vqa,runs/docvqa] method=ties density=0.3 output=runs/merged
python launch/merge.py models=[runs/one,runs/two] method=slerp weights=[0.7,0.3] output=runs/between
python launch/merge.py models=[runs/lora-a,runs/lora-b] method=ties samples=200 output=runs/merged   also score it
python launch/merge.py adapter=runs/lora-a output=runs/full
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.merging.run import MergeConfig, merge_models

if __name__ == "__main__":
    cli.run("merge", MergeConfig, merge_models)
