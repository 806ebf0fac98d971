"""Training in stages (`stages`): several trainings in one command and one run folder, each from the model before it.

command_line.py   the settings of each stage, composed and checked without PyTorch
settings.py       their configs: folders, the model that each starts from
run.py            train the stages that are not finished
log.py            the logs of all stages as one; plan.py: launch/plan.py for each stage
"""
