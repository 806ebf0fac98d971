"""Answers as HTML. All that a user, a data set or a model wrote is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.extras.serving.service import Told

LEGENDS = {
    "attention": ("Attention map", "how much the answer attends to each place"),
    "gradient": ("Gradient map", "how much each place supports the answer, by gradients"),
}


def answers(told: Sequence[Told], look: str | None = None) -> str:
    """A card for each question."""
    return f'<div class="vq-cards">{"".join(_card(one, look) for one in told)}</div>'


def two(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Two models side by side, each a name and what it answered."""
    columns = "".join(f"<section><h2>{escape(name)}</h2>{shown}</section>" for name, shown in (first, second))
    return f'<div class="vq-two">{columns}</div>'


def note(text: str, *, error: bool = False) -> str:
    """A sentence in place of answers."""
    return f'<p class="vq-note{" vq-error" if error else ""}"{" role=alert" if error else ""}>{escape(text)}</p>'


def _card(told: Told, look: str | None) -> str:
    bars = ""
    if told.alternatives:  # beam search may find a more probable answer than the greedy one, which is marked
        listed = sorted([(told.text, told.probability), *told.alternatives], key=lambda one: -one[1])
        bars = "".join(_bar(text, probability, text == told.text) for text, probability in listed)
    cut = " (truncated at max_new_tokens)" if told.cut else ""
    text = (
        f'<p class="vq-asked">{escape(told.question)}</p><p class="vq-answer">{words(told.text)}'
        f"<small>{percent(told.probability)}{cut}</small></p>{bars}"
    )
    return f'<article class="vq-card"><div>{text}</div>{_figure(told, look)}</article>'


def _bar(text: str, probability: float, best: bool) -> str:
    return (
        f'<div class="vq-bar{" vq-best" if best else ""}"><span>{words(text)}</span>'
        f'<i style="--part:{100 * probability:.1f}%"></i><span>{percent(probability)}</span></div>'
    )


def _figure(told: Told, look: str | None) -> str:
    if told.look is None or look is None:
        return ""
    picture = base64.b64encode(told.look).decode("ascii")
    name, meaning = LEGENDS[look]
    return (
        f'<figure><img src="data:image/png;base64,{picture}" alt="{escape(f"{name} of: {told.question}")}">'
        f'<figcaption><span class="vq-legend">low<i style="background-image:{HEAT}"></i>high</span>'
        f"<b>{name}</b>: {meaning}; where it is low, the picture is unchanged</figcaption></figure>"
    )


def words(text: str) -> str:
    """An answer, which may have none; HTML."""
    return escape(text) or "(no word)"


def percent(probability: float) -> str:
    """Rounded, but never to certainty; HTML."""
    shown = 100 * probability
    return "&lt; 0.1 %" if shown < 0.1 else f"{min(shown, 99.9):.1f} %"
