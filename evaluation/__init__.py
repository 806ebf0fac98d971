"""Plug-ins for other evaluation tools: crfm-helm and Hugging Face's `evaluate`.

helm/       HELM's score of a model: `vlmvqa helm checkpoint=...`
metrics/    our metrics as modules of `evaluate`, which then needs no network:

    import evaluate
    evaluate.load("evaluation/metrics/anls").compute(predictions=["42"], references=[["42", "forty-two"]])

Python imports this folder as `vlmvqa.evaluation`, in a checkout as in the installed package.
"""

if __name__ != "vlmvqa.evaluation":  # under a second name, modules and model weights would be loaded twice
    raise ImportError(f"import vlmvqa.evaluation, not {__name__}; HELM is started with: vlmvqa helm")
