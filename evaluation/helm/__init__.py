"""Score any model that `vlmvqa.load` reads with crfm-helm: `vlmvqa helm checkpoint=...`.

    run.py         the command: plan, check, run HELM, print one table
    plan.py        the plan of a run: settings and questions, validated
    checks.py      checks before the run: packages, nltk's data, images
    run_specs.py   HELM's run entries, vlmvqa_vqav2 and vlmvqa_gqa (found by helm-run as a plug-in)
    scenario.py    the questions: the sample that HELM takes, read from local official files
    client.py      the answers: a model's, or those that launch/eval.py wrote
    metrics.py     the benchmark's official accuracy, in addition to HELM's metrics
    runner.py      HELM's runner, with several threads only while the model answers
    results.py     HELM's results, checked and with intervals

Never put `evaluation/` on `sys.path`: this folder would be imported as `helm` instead of crfm-helm.
"""
