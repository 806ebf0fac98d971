"""Make what training reads, before it trains.

python launch/prepare.py download data=gqa data.root=/data/gqa
python launch/prepare.py check data=gqa data.root=/data/gqa
python launch/prepare.py pack data=vqav2 data.root=/data/vqav2 split=train
python launch/prepare.py features model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2

download    the benchmark's official archives, fetched and unpacked
check       what a data set holds beside what was published, and every record that cannot be used
pack        a split in a few large files, for disks that are slow with many small ones
features    the vision encoder's output, once for every image, for training with a frozen encoder

The first word says what is made; with -h after it, what that is and what can be set.
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.dataset_tools.run import PrepareConfig, run_job

if __name__ == "__main__":
    cli.run("prepare", PrepareConfig, run_job)
