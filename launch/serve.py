"""A page to try a trained model, and an HTTP API beside it, until Ctrl-C.

python launch/serve.py checkpoint=runs/demo
python launch/serve.py checkpoint=runs/demo compare=runs/other examples=photos port=8000
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.serving.run import ServeConfig, serve_model

if __name__ == "__main__":
    cli.run("serve", ServeConfig, serve_model)
    cli.leave()  # tearing down PyTorch and gradio takes longer than a user waits after Ctrl-C
