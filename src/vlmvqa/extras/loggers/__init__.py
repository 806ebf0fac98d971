"""Experiment loggers, chosen by `logger=`; `tracking.py` imports them by name.

All write below the run's folder unless configured otherwise, and a resumed run continues in the same place. TensorBoard
and the CSV table then drop the steps after the checkpoint; Weights & Biases and MLflow cannot, so these steps appear
twice there. transformers' own callbacks are not used: they drop no steps, log no samples or final scores, and write
elsewhere.
"""

PROJECT = "vlmvqa"  # default of WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME
