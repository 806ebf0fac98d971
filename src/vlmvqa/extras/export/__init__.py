"""Export of a trained model to an architecture of transformers, which loads without vlmvqa.

run.py          the config of launch/export.py; write the model, load it again and compare
paligemma.py    the model as PaliGemma: config, weight names, processor
"""
