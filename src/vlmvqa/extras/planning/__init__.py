"""What a training needs of its GPUs, counted without one.

the real model, without weights --one pass--> activations, logits, temporaries, FLOPs    memory.py, ledger.py
a strategy, its ranks and optimizer --------> weights, gradients, states, buffers        resident.py
both, and a GPU (gpus.py) ------------------> what fits, and how fast                    planner.py
----> table and recommendation (report.py); on a GPU, planned against measured (verify.py)
"""
