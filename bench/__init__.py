"""Measurements side by side, each printing a ratio of one run on one machine. Needs torch, timm, transformers, einops.

python -m bench.train      training, from the way it is written today to ours, step by step
python -m bench.generate   answering, against transformers' own `generate`
python -m bench.peers      the same fine-tuning in transformers' PaliGemma and its Trainer (needs accelerate)
python -m bench.loss       full logits against supervised positions only
python -m bench.data       are images read as fast as the model takes them?
python -m bench.scaling    does the cost grow as it should?
python -m bench.serving    answers over HTTP, together against one at a time (needs a checkpoint and the extra demo)

Each takes --model tiny | mid | real and --device cpu | cuda, prints a table, and writes it as JSON (--out).

What they share: shapes (what is asked), models (what answers, and the operations it takes), clock (time, memory, what
the machine can do), tables (options, table, JSON file). The rows of the table of `train` are in ladder.
"""
