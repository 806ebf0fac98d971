"""A web page to try a model and an HTTP API, for one machine or a trusted network.

A request passes through these files:

    page.html    the page (with page.css and page.js), which calls the API
    access.py    authentication, body limits and security headers
    api.py       routes, with the data models of openapi.py; browse.py answers those of a scored run
    chat.py      the routes of OpenAI's API, with the data models of chat_schema.py
    uploads.py   bytes to an image, text to questions, or an error of one sentence
    handler.py   waits for the result of an upload; errors.py makes the response if there is none
    batcher.py   the request queue and the thread that runs the models; completions.py: the requests of chat.py
    address.py   host and port
    run.py       the config of launch/serve.py, start and shutdown, the models, the browsed run and the examples
"""
