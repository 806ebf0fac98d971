"""Train a model, score it and write a report.

python launch/train.py                                             the tiny model on shapes
python launch/train.py model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2
accelerate launch launch/train.py +dist=fsdp                       on all GPUs of the machine
deepspeed launch/train.py                                          the same under ZeRO-2
python launch/train.py resume=auto                                 resume a stopped run
python launch/train.py -m trainer.learning_rate=1e-3,1e-4          a run for each value, and a table of their scores
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.config.schema import TrainConfig
    from vlmvqa.training.run import train

if __name__ == "__main__":
    cli.run("train", TrainConfig, train)
