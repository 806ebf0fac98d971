"""Merge models fine-tuned on different tasks without training, tensor by tensor from their safetensors files.

settings.py       merge methods and their settings
merge.py          check the models, merge them, write the merged folder
methods.py        merge methods on one chunk of a tensor from every model
statistics.py     per-part statistics for merge.json
files.py          read and write safetensors files in chunks
adapter_delta.py  the weight change of an adapter; base weights dequantized from 4 bits
tensor_names.py   tensor names in files, in models and as paths
validation.py     check that models are compatible; the merged config
logit_diff.py     compare the logits of two models
"""
