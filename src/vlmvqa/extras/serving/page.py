"""The Gradio page: ask about an image, browse a run's answers, compare two models.

Gradio's file components are not used: the browser sends an image by `POST /image`, and events name it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from vlmvqa.extras.serving import browse, html, uploads
from vlmvqa.extras.serving.limits import RequestError
from vlmvqa.extras.serving.service import Service
from vlmvqa.extras.serving.style import CSS, FONTS, GREYS, MONOSPACE_FONTS, UPLOAD_SCRIPT, UPLOAD_TEMPLATE
from vlmvqa.extras.serving.uploads import ImageCache

MAX_ALTERNATIVES = 3
ATTRIBUTIONS = [("Attention", "attention"), ("Gradient", "gradient"), ("Off", "off")]
ASK_HINT = "Answers appear here."
COMPARE_HINT = "Both models' answers appear here."
NO_IMAGE = "Drop an image first, or pick an example."
NO_QUESTION = "Write a question about the image, one per line."
NOT_CACHED = "This image is no longer cached; drop it again."
ONE_MODEL = "One model is served. Start the server with compare=runs/another to see two side by side."
NO_RUN = "No run is open. Start the server with browse=runs/name, a folder that has metrics.json."


def mount(app: FastAPI, service: Service, run: browse.Run | None, examples: Sequence[bytes], temporary: Path) -> None:
    """Mount the page at `/`; gradio writes its files to `temporary`."""
    # Before gradio is imported: it sends usage statistics and looks for new versions otherwise.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(temporary),
        "GRADIO_RUN_HISTORY": "False",
    }
    import gradio as gr

    blocks = _Page(gr, service, app.state.images, run, examples).build()
    blocks.state_session_capacity = service.limits.clients
    blocks.queue(max_size=service.limits.queue, default_concurrency_limit=None, api_open=False)
    theme = gr.themes.Base(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue=gr.themes.colors.Color(*GREYS, name="grey"),
        radius_size="lg",
        font=FONTS,
        font_mono=MONOSPACE_FONTS,
    )
    theme.set(body_text_color_subdued="*neutral_500")
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        allowed_paths=[],
        blocked_paths=["/"],
        max_file_size=1,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css=CSS,
    )


class _Page:
    """The page's components and event handlers."""

    def __init__(
        self, gr: Any, service: Service, images: ImageCache, run: browse.Run | None, examples: Sequence[bytes]
    ) -> None:
        self.gr, self.service, self.images, self.run = gr, service, images, run
        names = [images.add(content, pinned=True) for content in examples]
        self.examples = "".join(map(_example, names, examples, range(1, len(names) + 1)))

    def build(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="vlmvqa", analytics_enabled=False) as blocks:
            models = "Model: " if len(self.service.model_names) == 1 else "Models: "
            models += ", ".join(f"<b>{escape(name)}</b>" for name in self.service.model_names)
            gr.HTML(f'<header class="vq-head"><h1>vlmvqa</h1><p>{models}</p><a href="docs">HTTP API</a></header>')
            with gr.Tabs():
                with gr.Tab("Ask"):
                    self._question_tab("ask", "Ask", ASK_HINT, self._ask, attribution=True)
                with gr.Tab("Browse"):
                    self._browse_tab()
                with gr.Tab("Compare"):
                    if len(self.service.model_names) < 2:
                        gr.HTML(html.note(ONE_MODEL))
                    else:
                        self._question_tab("compare", "Ask both", COMPARE_HINT, self._compare, attribution=False)
        return blocks

    def _question_tab(self, tab: str, button_text: str, placeholder: str, handler: Any, attribution: bool) -> None:
        """Add an image, a text box, a button and the answers; with `attribution`, a choice of its method."""
        gr = self.gr
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="vq-side"):
                inputs = [self._image(f"{tab}-image")]
            with gr.Column(scale=3, min_width=300):
                questions = gr.Textbox(
                    label="Questions, one per line",
                    lines=3,
                    max_lines=8,
                    placeholder="What color is it?",
                    elem_id=f"{tab}-questions",
                )
                inputs.append(questions)
                if attribution:
                    methods = {"value": "attention", "label": "Attention map", "elem_id": f"{tab}-attribution"}
                    inputs.append(gr.Radio(ATTRIBUTIONS, **methods))
                button = gr.Button(button_text, variant="primary", elem_id=f"{tab}-button")
                answers = gr.HTML(html.note(placeholder), elem_id=f"{tab}-answers")
        for event in (button.click, *(method.input for method in inputs[2:])):
            event(handler, inputs, answers, show_progress="minimal")

    def _browse_tab(self) -> None:
        gr, run = self.gr, self.run
        if run is None:
            gr.HTML(html.note(NO_RUN))
            return
        first_page, _, num_pages = browse.page(run, "all", browse.ANY_TYPE, "any", 0)
        with gr.Row(equal_height=True, elem_id="browse-filters"):
            options = [(option.capitalize(), option) for option in browse.CORRECTNESS]
            correctness = gr.Radio(options, value="all", label="Answers", elem_id="browse-correctness")
            types = [browse.ANY_TYPE, *run.types]
            kind = gr.Dropdown(types, value=browse.ANY_TYPE, label="Question type", elem_id="browse-type")
            ranges = list(browse.CONFIDENCE)
            confidence = gr.Radio(ranges, value=ranges[0], label="Confidence", elem_id="browse-confidence")
        answers = gr.HTML(first_page, elem_id="browse-answers")
        with gr.Row():
            previous = gr.Button("Previous", interactive=False, elem_id="browse-previous")
            following = gr.Button("Next", interactive=num_pages > 1, elem_id="browse-next")
        index = gr.State(0)
        filters, outputs = [correctness, kind, confidence], [answers, index, previous, following]
        for component in filters:
            component.change(self._turn_page, filters, outputs, show_progress="hidden")
        for button, step in ((previous, -1), (following, 1)):
            turn = partial(self._turn_page, step=step)
            button.click(turn, [*filters, index], outputs, show_progress="hidden")

    def _image(self, elem_id: str) -> Any:
        """Return the upload component; its value is the name of a cached image."""
        limits = self.service.limits
        return self.gr.HTML(
            "",
            html_template=UPLOAD_TEMPLATE,
            js_on_load=UPLOAD_SCRIPT,
            elem_id=elem_id,
            label="Image",
            hint=f"{', '.join(uploads.FORMATS)}, up to {limits.megabytes:g} MB",
            examples=self.examples,
            max_bytes=limits.bytes,
            too_large=_sentence(uploads.too_many_bytes(limits)),
        )

    async def _ask(self, image: str, text: str, method: str) -> str:
        return await self._answer(self.service.model_names[0], image, text, None if method == "off" else method)

    async def _compare(self, image: str, text: str) -> str:
        first, second = self.service.model_names[:2]
        answers = await asyncio.gather(*(self._answer(model, image, text, None) for model in (first, second)))
        return html.columns((first, answers[0]), (second, answers[1]))

    async def _answer(self, model: str, image: str, text: str, method: str | None) -> str:
        """Return the answers to the questions in the lines of `text`, or an error message, as HTML."""
        content = self.images.get(str(image)) if image else None
        lines = [line for line in str(text or "").splitlines() if line.strip()]
        if content is None:
            return html.note(NOT_CACHED if image else NO_IMAGE, error=bool(image))
        if not lines:
            return html.note(NO_QUESTION)
        alternatives = min(MAX_ALTERNATIVES, self.service.limits.alternatives)
        try:
            results = await self.service.answer(
                content, lines, model=model, alternatives=alternatives, attribution=method
            )
        except RequestError as error:
            return html.note(_sentence(error), error=True)
        return html.cards(results, method)

    def _turn_page(
        self, correctness: str, kind: str, confidence: str, index: int = 0, step: int = 0
    ) -> tuple[str, int, Any, Any]:
        """Return the page `step` pages after `index`, its index, and the states of both buttons."""
        assert self.run is not None
        answers, index, num_pages = browse.page(
            self.run, str(correctness), str(kind), str(confidence), int(index) + step
        )
        buttons = (self.gr.Button(interactive=index > 0), self.gr.Button(interactive=index < num_pages - 1))
        return answers, index, *buttons


def _sentence(error: RequestError) -> str:
    return error.message[:1].upper() + error.message[1:] + "."


def _example(name: str, content: bytes, number: int) -> str:
    thumbnail = f'<img src="{browse.thumbnail(content, "an example")}" alt="">'
    return f'<button type="button" data-image="{name}" aria-label="example {number}">{thumbnail}</button>'
