"""A page to try a model and an HTTP API beside it, for one machine or a trusted network.

What a client sent goes one way, and each step is one file:

    guard.py     who may ask, how much may be sent, which of gradio's routes there are
    api.py       the routes                              page.py   the page, over cards.py browse.py style.py
    uploads.py   bytes to a picture, text to questions, or one sentence why not
    service.py   a picture and its questions to answers, for the API and for the page
    batcher.py   the one thread that asks the models
    overlay.py   an attention map, as a PNG
    server.py    a port, and how it ends
"""
