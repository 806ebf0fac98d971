"""Models that were tuned on different tasks, made one without training: tensor by tensor, out of their files.

methods.py    what is done with a piece of a tensor of each model
files.py      pieces out of safetensors files, and into one
merge.py      both together: what is refused, what is counted
"""
