"""Prepare data: download, check, pack, cache features, write files for evaluation harnesses.

python launch/prepare.py download data=gqa data.root=/data/gqa
python launch/prepare.py check data=gqa data.root=/data/gqa
python launch/prepare.py pack data=vqav2 data.root=/data/vqav2 split=train
python launch/prepare.py features model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2
python launch/prepare.py harness data=shapes harness.format=lmms_eval

download    download and unpack the benchmark's official archives
check       compare a dataset with its published counts, and list every record that cannot be used
pack        write a split to a few large files, for disks that are slow with many small ones
features    cache the vision encoder's output for every image, for training with a frozen encoder
harness     write the files by which lmms-eval or VLMEvalKit reads a split

The first word chooses the job; -h after it prints the job's page.
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.dataset_tools.run import PrepareConfig, run_job

if __name__ == "__main__":
    cli.run("prepare", PrepareConfig, run_job)
