"""Score any model that `vlmvqa.load` reads with VLMEvalKit: `python -m vlmvqa.evaluation.vlmevalkit_adapter.run`.

    model.py   the model class: build_prompt and generate_inner
    run.py     the command: registers the model, then calls VLMEvalKit's own run.py

Written against VLMEvalKit's commit e8e78f05f3080fe28154f2130321f17951c3be94; its checkout is not changed.
"""
