"""Compare a model's vision encoder with timm's and its language model with transformers', on your own weights.

python launch/verify.py model=dinov2_gemma2_2b
python launch/verify.py model.language.name=/models/gemma-2-2b
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.parity.verify import VerifyConfig, verify

if __name__ == "__main__":
    cli.run("verify", VerifyConfig, verify)
