"""Serve a trained model until Ctrl-C: a web page to try it, and an HTTP API.

python launch/serve.py checkpoint=runs/demo
python launch/serve.py checkpoint=runs/demo compare=runs/other examples=photos port=8000
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.serving.run import ServeConfig, serve_model

if __name__ == "__main__":
    cli.run("serve", ServeConfig, serve_model)
    cli.leave()  # shutting down PyTorch takes longer than a user waits after Ctrl-C
