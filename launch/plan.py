"""Plan a training run: memory and speed under every strategy, without the GPUs, data or weights.

python launch/plan.py experiment=vlm_vqa_4xa10g
python launch/plan.py model=dinov2_gemma2_2b data=vqav2 dist=zero3 plan.gpu=a100_80 plan.gpus=2
python launch/plan.py model=paligemma_3b adapt=qlora data=docvqa plan.gpu=a4000 plan.gpus=1
python launch/plan.py experiment=vlm_vqa_4xa10g verify=true    plan and measure three steps on this GPU
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.planning.run import PlanConfig, plan

if __name__ == "__main__":
    cli.run("plan", PlanConfig, plan)
