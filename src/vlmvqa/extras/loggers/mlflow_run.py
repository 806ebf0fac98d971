"""MLflow logger: an MLflow run in `mlruns/` of the run's folder, or on the server in MLFLOW_TRACKING_URI.

The default is a folder of files, although MLflow recommends a database: a database needs the full `mlflow` package (or
SQLAlchemy), and one run has few metrics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from vlmvqa.errors import InputError
from vlmvqa.extras.loggers import PROJECT
from vlmvqa.extras.loggers.samples import Sample
from vlmvqa.extras.loggers.tracking import RUN_ID_FILES, Logger, RunInfo

# MLflow reads these when it is imported: allow the file store, disable telemetry.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from transformers.utils.generic import flatten_dict

MAX_PARAMS = 100  # limit of MLflow's servers per request


class MlflowRun(Logger):
    """Log metrics, parameters, and samples as text and image artifacts."""

    shows_samples = True

    def __init__(self, run: RunInfo) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").resolve().as_uri()
        id_file = run.folder / RUN_ID_FILES["mlflow"]
        try:
            self.client = MlflowClient(tracking_uri=uri)
            self.id = id_file.read_text() if id_file.exists() else self._create(run)
            self.client.update_run(self.id, status="RUNNING")
            self.client.log_text(self.id, run.config_yaml, "config.yaml")
            self.client.set_tag(self.id, "code", run.code)
        except (MlflowException, OSError) as error:
            raise InputError(
                f"logger=mlflow: MLflow cannot open a run at {uri} ({' '.join(str(error).split())}); correct "
                "MLFLOW_TRACKING_URI, unset it to write into the run's folder, or choose logger=tensorboard"
            ) from error
        id_file.write_text(self.id)

    def _create(self, run: RunInfo) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        run_id: str = self.client.create_run(experiment, run_name=run.name).info.run_id
        # Only once: MLflow's parameters are immutable, and a resumed run may change the logging interval.
        params = [Param(key, str(value)[:500]) for key, value in flatten_dict(dict(run.config)).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        return run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a training step."""
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Log a text file of all samples, and an image file of each."""
        folder = f"samples/{step:08d}"
        text = "\n\n".join(f"{sample.name}\n{sample.text()}" for sample in samples)
        self.client.log_text(self.id, text, f"{folder}.txt")
        for sample in samples:
            if sample.thumbnail is not None:
                self.client.log_image(self.id, sample.thumbnail.convert("RGB"), f"{folder}/{sample.name}.png")

    def close(self, finished: bool) -> None:
        """Mark the run as finished or killed."""
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")
