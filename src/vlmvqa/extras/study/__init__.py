"""Ablation studies: arms (overrides of one base config) trained with several seeds and compared with a baseline arm.

command_line.py   the arms' settings, checked without PyTorch; settings.py: their configs and runs
cost.py, plan.py  steps, operations and memory of each arm, here and on planned GPUs
run.py            train the runs, one process or several; progress.py: the bar over all of them
results.py        read the runs; statistics.py: intervals, tests, Holm's correction, power
tables.py         text, Markdown and LaTeX; report_page.py: the HTML page
"""
