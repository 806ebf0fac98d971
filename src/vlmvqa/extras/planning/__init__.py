"""Estimate the GPU memory and speed of a training run, without a GPU, data or weights.

memory.py            activations, logits and FLOPs of one forward and backward pass, measured on the model without
                     weights (memory_tracker.py, cuda_emulation.py, batches.py)
strategy_memory.py   weights, gradients, optimizer states (optimizer_memory.py) and buffers under each strategy
quantized_memory.py  weights in 4 bits
published_sizes.py   sizes and rows of pretrained models
gpus.py              memory and speed of common GPUs
time.py              time of a step: computation, communication, overlap, optimizer
planner.py           their sum: a plan per strategy, the largest batch, the fastest run
report.py            tables and recommendation
verify.py            planned against measured memory, on a GPU
"""
