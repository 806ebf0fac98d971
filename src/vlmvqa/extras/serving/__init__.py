"""A web page to try a model and an HTTP API, for one machine or a trusted network.

A request passes through these files:

    access.py    authentication, allowed routes and methods, body limits
    api.py       API routes, described by openapi.py
    page.py      Gradio page, rendered by html.py, browse.py and style.py
    uploads.py   bytes to an image, text to questions, or an error of one sentence
    service.py   an image and its questions to answers, for the API and the page
    batcher.py   the request queue and the thread that runs the models
    server.py    address, start and shutdown
    run.py       the config of launch/serve.py, its models, the browsed run and the examples
"""
