"""Score any model that `vlmvqa.load` reads with lmms-eval: `lmms-eval --model vlmvqa --model_args checkpoint=...`.

    registration.py   the entry point by which lmms-eval finds the model
    requests.py       requests as examples (one row for all questions about an image), decoding settings, stop sequences
    model.py          the model class: generate_until and loglikelihood

The task files of a dataset are written by `python launch/prepare.py harness`.
"""
