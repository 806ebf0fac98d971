"""The model's parts, plain `nn.Module`s; `vlm.py` is the file of truth."""
