"""Search the settings of a training with Optuna: propose, train, prune, and report the best.

python launch/sweep.py sweep=learning_rate                         20 trials
python launch/sweep.py sweep=learning_rate size=smoke trials=4     its small version
python launch/sweep.py sweep=learning_rate base=data=vqav2 base=data.root=/data/vqav2 trials=40
python launch/sweep.py sweep=learning_rate only_report=true        report the trials that have ended

The same command continues a sweep that was killed, and a larger number of trials adds to it.
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.sweep.run import run_sweep
    from vlmvqa.extras.sweep.settings import SweepConfig

if __name__ == "__main__":
    cli.run("sweep", SweepConfig, run_sweep)
