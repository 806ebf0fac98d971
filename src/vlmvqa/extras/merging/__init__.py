"""Models that were tuned on different tasks, made one without training: tensor by tensor, out of their files.

methods.py    what is done with a piece of a tensor of each model
files.py      pieces out of safetensors files, and into one
layout.py     what a tensor is called in a file, in the model, and to the user
adapted.py    an adapter as what it adds to its base, and a base as adapters over 4 bits saw it
fit.py        what is refused, and what the merged model is asked with
merge.py      all together, and what is counted
drift.py      how far a merged model's logits are from what it was made of
"""
