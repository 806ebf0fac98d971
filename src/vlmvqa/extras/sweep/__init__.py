"""Hyperparameter search with Optuna (launch/sweep.py). Hydra's own sweeps, `-m a=1,2`, are in config/sweep.py.

space.py          the search space of a file in conf/sweep
command_line.py   checks without PyTorch
settings.py       the config, and the run that a trial trains
search.py         Optuna's study on disk: proposals, trials that were interrupted, pruning
run.py            the command
report.py         sweep.json, the printed table, report.html
"""
