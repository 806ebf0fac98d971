"""Run entries for HELM: its own `vqa` and `gqa`, prompt and metrics unchanged, on local questions.

    vlmvqa_vqav2:root=/data/vqav2,max_instances=1000,image_mode=real,model=vlmvqa/my_model
    vlmvqa_gqa:root=/data/gqa,...

`helm-run` finds this file by the entry point in setup.cfg, or with `--plugins vlmvqa.evaluation.helm.run_specs`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.run_specs.vlm_run_specs import get_gqa_spec, get_vqa_spec
from helm.benchmark.scenarios.scenario import ScenarioSpec


@run_spec_function("vlmvqa_vqav2")
def vqav2(root: str, max_instances: int = 1000, image_mode: str = "real", seed: int = 0) -> RunSpec:
    """Return HELM's VQAv2 run; its group in the schema: vqa_base, vqa_blank or vqa_shuffled."""
    given = {"root": root, "max_instances": max_instances, "image_mode": image_mode, "seed": seed}
    return _on_local_files(get_vqa_spec(), "vqa", "VQAv2Sample", "vqa_accuracy", given)


@run_spec_function("vlmvqa_gqa")
def gqa(root: str, max_instances: int = 1000, image_mode: str = "real", seed: int = 0) -> RunSpec:
    """Return HELM's GQA run; its group in the schema: gqa, gqa_blank or gqa_shuffled."""
    given = {"root": root, "max_instances": max_instances, "image_mode": image_mode, "seed": seed}
    return _on_local_files(get_gqa_spec(), "gqa", "GQASample", "gqa_accuracy", given)


def _on_local_files(built_in: RunSpec, name: str, scenario: str, accuracy: str, given: dict[str, Any]) -> RunSpec:
    """Return HELM's run with our scenario, and with the official accuracy in addition to its metrics."""
    mode = str(given["image_mode"])
    group = {"vqa": "vqa_base", "gqa": "gqa"}[name] if mode == "real" else f"{name}_{mode}"
    return replace(
        built_in,
        name=f"{built_in.name}:image_mode={mode},max_instances={given['max_instances']}",
        scenario_spec=ScenarioSpec(f"vlmvqa.evaluation.helm.scenario.{scenario}", given),
        metric_specs=[
            *built_in.metric_specs,
            MetricSpec("vlmvqa.evaluation.helm.metrics.OfficialAccuracy", {"name": accuracy}),
        ],
        groups=[group],
    )
