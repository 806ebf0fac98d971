"""crfm-helm's benchmark of any model that `vlmvqa.load` reads: `vlmvqa helm checkpoint=...`.

    run.py         the command: plan.py (what is asked for), checks.py (what HELM would stumble over), HELM, one table
    run_specs.py   HELM's run entries, vlmvqa_vqav2 and vlmvqa_gqa (found by helm-run as a plug-in)
    scenario.py    the questions: HELM's own draw, from the official files here
    client.py      the answers: a model's, or those that launch/eval.py wrote
    metrics.py     the benchmark's official accuracy, beside HELM's metrics
    runner.py      HELM's own, with its threads for the model alone
    results.py     what HELM measured, checked and with intervals

Never put `evaluation/` on `sys.path`: this folder would be imported as `helm`, in place of crfm-helm.
"""
