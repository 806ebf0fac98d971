"""The page: ask about a picture, browse a run's answers, compare two models. Gradio's, mounted beside the API.

Of gradio it uses components and events, not files: pictures come by `POST /picture` and are asked about by name.
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
from vlmvqa.extras.serving.limits import Refused
from vlmvqa.extras.serving.pictures import Pictures
from vlmvqa.extras.serving.service import Service
from vlmvqa.extras.serving.style import CSS, DROP, DROPPED

ALTERNATIVES = 3  # beside the answer
LOOKS = [("Attention", "attention"), ("Gradient", "gradient"), ("Off", "off")]
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
NO_PICTURE = "Drop a picture first, or pick an example."
ONE_MODEL = "One model is served. Start the server with compare=runs/another to see two side by side."
NO_RUN = "No run is open. Start the server with browse=runs/name, a folder that has metrics.json."
GONE = "This picture is no longer kept; drop it again."
ASK = "Ask something about the picture, one question a line."


def mount(app: FastAPI, service: Service, run: browse.Run | None, examples: Sequence[bytes], temporary: Path) -> None:
    """Put the page at `/`.

    Args:
        run: whose answers can be browsed.
        examples: pictures' files to pick from.
        temporary: a folder for what gradio believes it must write.
    """
    # Before it is imported: it counts its users and asks for its newest version, unless told not to.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(temporary),
        "GRADIO_RUN_HISTORY": "False",
    }
    import gradio as gr

    pictures = app.state.pictures
    blocks = _Page(gr, service, pictures, run, examples).build()
    blocks.state_session_capacity = service.limits.clients
    blocks.queue(max_size=service.limits.queue, default_concurrency_limit=None, api_open=False)
    grey = gr.themes.colors.Color(*_GREYS, name="grey")
    theme = gr.themes.Base(
        primary_hue="blue", secondary_hue="blue", neutral_hue=grey, radius_size="lg", font=FONT, font_mono=MONO
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


_GREYS = (
    *("#fbfbfa", "#f4f5f5", "#e4e7ea", "#d3d8dd", "#a3abb5", "#667180"),
    *("#4d5764", "#363f4a", "#222931", "#14181e", "#0e1116"),
)


class _Page:
    """The components and what their events do."""

    def __init__(
        self, gr: Any, service: Service, pictures: Pictures, run: browse.Run | None, examples: Sequence[bytes]
    ) -> None:
        self.gr, self.service, self.pictures, self.run = gr, service, pictures, run
        named = [(pictures.keep_always(content), content) for content in examples]
        self.examples = "".join(_example(*one, number) for number, one in enumerate(named, start=1))

    def build(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="vlmvqa", analytics_enabled=False) as blocks:
            models = "Model: " if len(self.service.names) == 1 else "Models: "
            models += ", ".join(f"<b>{escape(name)}</b>" for name in self.service.names)
            gr.HTML(f'<header class="vq-head"><h1>vlmvqa</h1><p>{models}</p><a href="docs">HTTP API</a></header>')
            with gr.Tabs():
                with gr.Tab("Ask"):
                    self._ask_tab()
                with gr.Tab("Browse"):
                    self._browse_tab()
                with gr.Tab("Compare"):
                    self._compare_tab()
        return blocks

    def _ask_tab(self) -> None:
        gr = self.gr
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="vq-side"):
                picture = self._picture("ask")
            with gr.Column(scale=3, min_width=300):
                questions = self._questions("ask")
                look = gr.Radio(LOOKS, value="attention", label="Attention map", elem_id="ask-look")
                button = gr.Button("Ask", variant="primary", elem_id="ask-button")
                shown = gr.HTML(html.note("Answers appear here."), elem_id="ask-answers")
        asked = {"fn": self._ask, "inputs": [picture, questions, look], "outputs": shown, "show_progress": "minimal"}
        button.click(**asked)
        look.input(**asked)

    def _compare_tab(self) -> None:
        gr = self.gr
        if len(self.service.names) < 2:
            gr.HTML(html.note(ONE_MODEL))
            return
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="vq-side"):
                picture = self._picture("compare")
            with gr.Column(scale=3, min_width=300):
                questions = self._questions("compare")
                button = gr.Button("Ask both", variant="primary", elem_id="compare-button")
                shown = gr.HTML(html.note("Both models' answers appear here."), elem_id="compare-answers")
        button.click(self._compare, [picture, questions], shown, show_progress="minimal")

    def _browse_tab(self) -> None:
        gr, run = self.gr, self.run
        if run is None:
            gr.HTML(html.note(NO_RUN))
            return
        with gr.Row(equal_height=True, elem_id="browse-filters"):
            found = [(one.capitalize(), one) for one in browse.WHICH]
            which = gr.Radio(found, value="all", label="Answers", elem_id="browse-which")
            kinds = [browse.EVERY, *run.types]
            kind = gr.Dropdown(kinds, value=browse.EVERY, label="Question type", elem_id="browse-kind")
            surest = list(browse.CONFIDENCE)
            sure = gr.Radio(surest, value=surest[0], label="Confidence", elem_id="browse-sure")
        shown = gr.HTML(browse.page(run, "all", browse.EVERY, "", 0)[0], elem_id="browse-answers")
        with gr.Row():
            back = gr.Button("Previous", interactive=False, elem_id="browse-back")
            on = gr.Button("Next", interactive=self._pages() > 1, elem_id="browse-on")
        place = gr.State(0)
        filters, outputs = [which, kind, sure], [shown, place, back, on]
        for one in filters:
            one.change(self._turn, filters, outputs, show_progress="hidden")
        for button, step in ((back, -1), (on, 1)):
            turn = partial(self._turn, step=step)
            button.click(turn, [*filters, place], outputs, show_progress="hidden")

    def _picture(self, name: str) -> Any:
        limits = self.service.limits
        return self.gr.HTML(
            "",
            html_template=DROP,
            js_on_load=DROPPED,
            elem_id=f"{name}-picture",
            label="Picture",
            hint=f"{', '.join(uploads.FORMATS)}, up to {limits.megabytes:g} MB",
            examples=self.examples,
            most=limits.bytes,
            too_large=uploads.too_many_bytes(limits).sentence.capitalize() + ".",
        )

    def _questions(self, name: str) -> Any:
        return self.gr.Textbox(
            label="Questions, one a line",
            lines=3,
            max_lines=8,
            placeholder="What color is it?",
            elem_id=f"{name}-questions",
        )

    async def _ask(self, name: str, text: str, look: str) -> str:
        method = None if look == "off" else look
        return await self._answers(self.service.names[0], name, text, method)

    async def _compare(self, name: str, text: str) -> str:
        first, second = self.service.names[:2]
        shown = await asyncio.gather(*(self._answers(model, name, text, None) for model in (first, second)))
        return html.two((first, shown[0]), (second, shown[1]))

    async def _answers(self, model: str, name: str, text: str, look: str | None) -> str:
        """What is answered, or the sentence why not."""
        content = self.pictures.find(str(name)) if name else None
        lines = [line for line in str(text or "").splitlines() if line.strip()]
        if content is None:
            return html.note(GONE if name else NO_PICTURE, error=bool(name))
        if not lines:
            return html.note(ASK)
        most = min(ALTERNATIVES, self.service.limits.alternatives)
        try:
            with self.service.admitted():
                told = await self.service.ask(content, lines, model=model, alternatives=most, look=look)
        except Refused as refused:
            return html.note(refused.sentence[:1].upper() + refused.sentence[1:] + ".", error=True)
        return html.answers(told, look)

    def _pages(self) -> int:
        assert self.run is not None
        return browse.page(self.run, "all", browse.EVERY, "", 0)[2]

    def _turn(self, which: str, kind: str, sure: str, number: int = 0, step: int = 0) -> tuple[str, int, Any, Any]:
        """The page of answers that is so many on from this one, its number, and the buttons that turn it."""
        assert self.run is not None
        html, number, pages = browse.page(self.run, str(which), str(kind), str(sure), int(number) + step)
        turns = (self.gr.Button(interactive=number > 0), self.gr.Button(interactive=number < pages - 1))
        return html, number, *turns


def _example(name: str, content: bytes, number: int) -> str:
    uri = browse.thumbnail(content, "an example")
    shown = f'<img src="{uri}" alt="">'
    return f'<button type="button" data-picture="{name}" aria-label="example {number}">{shown}</button>'
