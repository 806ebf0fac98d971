"""Benchmarks that print ratios measured in one run on one machine. Need torch, timm, transformers, einops.

python -m bench.train      training, from a plain transformers recipe to ours, step by step
python -m bench.generate   generation, compared with transformers' `generate`
python -m bench.peers      the same fine-tuning with transformers' PaliGemma and Trainer (needs accelerate)
python -m bench.loss       the loss of full logits and of supervised positions only
python -m bench.data       image loading speed, and the number of workers that the model needs
python -m bench.scaling    growth of the cost with questions, prompts, image size and batch
python -m bench.serving    micro-batched HTTP answers (needs a checkpoint and the extra demo)

Most take --model tiny | mid | real and --device cpu | cuda; each prints a table and writes it as JSON (--out).

Shared modules: shapes (questions), models (models and their FLOPs), clock (time, memory, the machine's peak rates),
tables (options, table, JSON file). The rows of the table of `train` are defined in ladder.
"""
