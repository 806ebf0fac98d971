"""Answers as HTML; all text from users, datasets and models is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.extras.serving.openapi import Alternative, QuestionAnswer

LEGENDS = {
    "attention": ("Attention map", "how much the answer attends to each place"),
    "gradient": ("Gradient map", "how much each place supports the answer, by gradients"),
}


def cards(answers: Sequence[QuestionAnswer], method: str | None = None) -> str:
    """Return a card for each question; `method` is that of the attribution maps, None without maps."""
    return f'<div class="vq-cards">{"".join(_card(answer, method) for answer in answers)}</div>'


def columns(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Return the answers of two models side by side, each given as its name and its cards."""
    sections = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in (first, second))
    return f'<div class="vq-two">{sections}</div>'


def note(text: str, *, error: bool = False) -> str:
    """Return a message shown in place of answers."""
    return f'<p class="vq-note{" vq-error" if error else ""}"{" role=alert" if error else ""}>{escape(text)}</p>'


def answer_text(text: str) -> str:
    """Return an answer, or a placeholder for an empty one."""
    return escape(text) or "(no word)"


def percent(probability: float) -> str:
    """Return a rounded percentage, at least "< 0.1 %" and at most 99.9 %."""
    value = 100 * probability
    return "&lt; 0.1 %" if value < 0.1 else f"{min(value, 99.9):.1f} %"


def _card(answer: QuestionAnswer, method: str | None) -> str:
    bars = ""
    if answer.alternatives:  # beam search may find an answer that is more probable than the greedy one
        best = Alternative(text=answer.text, probability=answer.probability)
        ranked = sorted([best, *answer.alternatives], key=lambda one: -one.probability)
        bars = "".join(_bar(one.text, one.probability, one.text == answer.text) for one in ranked)
    truncated = " (truncated at max_new_tokens)" if answer.truncated else ""
    text = (
        f'<p class="vq-question">{escape(answer.question)}</p><p class="vq-answer">{answer_text(answer.text)}'
        f"<small>{percent(answer.probability)}{truncated}</small></p>{bars}"
    )
    return f'<article class="vq-card"><div>{text}</div>{_figure(answer, method)}</article>'


def _bar(text: str, probability: float, best: bool) -> str:
    return (
        f'<div class="vq-bar{" vq-best" if best else ""}"><span>{answer_text(text)}</span>'
        f'<i style="--part:{100 * probability:.1f}%"></i><span>{percent(probability)}</span></div>'
    )


def _figure(answer: QuestionAnswer, method: str | None) -> str:
    if answer.attribution is None or method is None:
        return ""
    name, meaning = LEGENDS[method]
    alt = escape(f"{name} of: {answer.question}")
    return (
        f'<figure><img src="data:image/png;base64,{answer.attribution}" alt="{alt}">'
        f'<figcaption><span class="vq-legend">low<i style="background-image:{HEAT}"></i>high</span>'
        f"<b>{name}</b>: {meaning}; where it is low, the image is unchanged</figcaption></figure>"
    )
