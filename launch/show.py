"""Show one sample as the model reads it: tokens, roles, supervision, positions and attention mask.

python launch/show.py sample=3
python launch/show.py model.attention_pattern=causal data=vqav2 data.root=/data/vqav2
python launch/show.py model=tiny_paligemma data.row_tokens=null
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.report.show import ShowConfig, show

if __name__ == "__main__":
    cli.run("show", ShowConfig, show)
