"""What other evaluation tools load of this project.

metrics/    our metrics as modules of Hugging Face's `evaluate`, which then needs no network:

    import evaluate
    evaluate.load("evaluation/metrics/anls").compute(predictions=["42"], references=[["42", "forty-two"]])
"""
