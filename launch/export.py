"""Export a trained prefix_lm model as PaliGemma, which transformers loads without vlmvqa.

python launch/export.py checkpoint=runs/demo format=paligemma output=exported/demo
python launch/export.py checkpoint=runs/demo/checkpoint-300 format=paligemma output=exported/step-300
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.export.run import ExportConfig, export

if __name__ == "__main__":
    cli.run("export", ExportConfig, export)
