"""A row in readable form: a table of its tokens, and a plot of its attention mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmvqa.data.processor import Processor
from vlmvqa.sequence.masks import Tokens, visible
from vlmvqa.sequence.rows import ANSWER, IGNORE, IMAGE, PADDING, PROMPT

COLUMNS = ("input_ids", "document", "branch", "role", "position", "labels")
ROLES = {IMAGE: "image", PROMPT: "prompt", ANSWER: "answer"}
COLORS = {IMAGE: "#4c78a8", PROMPT: "#72b7b2", ANSWER: "#e45756"}


def describe(batch: Mapping[str, Tensor], processor: Processor, row: int = 0) -> str:
    """Return a table of the row's tokens, and the decoded tokens that each question's last token attends to."""
    columns = {name: batch[name][row].tolist() for name in COLUMNS}
    words = _words(columns, processor)
    lines = [f"{'index':>5} {'token':<16}{'document':>9}{'branch':>7} {'role':<7}{'position':>9}  predicts"]
    previous_image = False
    for index, word in enumerate(words):
        if columns["document"][index] == PADDING:
            lines.append(f"{index:>5} ... {len(words) - index} padding tokens, masked")
            break
        if columns["role"][index] == IMAGE:  # one line for all tokens of an image
            if previous_image:
                continue
            end = next((at for at in range(index, len(words)) if columns["role"][at] != IMAGE), len(words))
            word = f"image x {end - index}"
        previous_image = columns["role"][index] == IMAGE
        label = columns["labels"][index]
        predicts = "" if label == IGNORE else repr(processor.tokenizer.decode([label]))
        lines.append(
            f"{index:>5} {word:<16}{columns['document'][index]:>9}{columns['branch'][index]:>7} "
            f"{ROLES[columns['role'][index]]:<7}{columns['position'][index]:>9}  {predicts}"
        )
    mask = _mask(batch, row)
    lines.append("visible to the last token of each question:")
    for index in _last_of_each_question(columns):
        keys = [other for other in range(len(words)) if mask[index, other]]
        images = sum(columns["role"][other] == IMAGE for other in keys)
        text = processor.tokenizer.decode([columns["input_ids"][o] for o in keys if columns["role"][o] != IMAGE])
        lines.append(f"{index:>5} {images} image tokens, then {text!r}")
    return "\n".join(lines)


def draw(batch: Mapping[str, Tensor], processor: Processor, path: Path, title: str, row: int = 0) -> None:
    """Plot the mask as a grid (queries down, keys across); keys coloured by role, supervised tokens framed."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    columns = {name: batch[name][row].tolist() for name in COLUMNS}
    length = sum(document != PADDING for document in columns["document"])
    roles = torch.tensor(columns["role"][:length])
    mask = _mask(batch, row)[:length, :length]
    # A cell shows the role of the visible key, or white.
    cells = torch.where(mask, roles[None, :] + 1, 0)
    side = min(max(6.0, length * 0.11), 24.0)
    figure = Figure(figsize=(side + 2.5, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(cells, cmap=ListedColormap(["white", *COLORS.values()]), vmin=0, vmax=3, interpolation="nearest")
    for index in range(length):
        if columns["labels"][index] != IGNORE:
            axes.add_patch(Rectangle((index - 0.5, index - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2))
    text = [index for index in range(length) if columns["role"][index] != IMAGE]
    words = _words(columns, processor)
    size = min(7.0, 70 * side / length)
    axes.set_yticks(text, [f"{words[i]}  {columns['position'][i]}" for i in text], fontsize=size)
    for label, index in zip(axes.get_yticklabels(), text, strict=True):
        label.set_color(COLORS[columns["role"][index]])
    axes.set_xticks([])
    axes.set_title(f"{title}\n{processor.attention_pattern}: queries down, keys across; token and position", fontsize=9)
    handles = [Patch(color=COLORS[role], label=f"attends to {name}") for role, name in ROLES.items()]
    handles.append(Patch(fill=False, edgecolor="black", label="supervised"))
    axes.legend(handles=handles, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110)


def _mask(batch: Mapping[str, Tensor], row: int) -> Tensor:
    tokens = Tokens.of(batch).map(lambda t: t[row])
    return visible(tokens.map(lambda t: t[:, None]), tokens.map(lambda t: t[None, :]))


def _words(columns: Mapping[str, list[int]], processor: Processor) -> list[str]:
    words = []
    for token, role in zip(columns["input_ids"], columns["role"], strict=True):
        word = "image" if role == IMAGE else str(processor.tokenizer.decode([token]))
        words.append(word.strip() or repr(word).strip("'"))
    return words


def _last_of_each_question(columns: Mapping[str, list[int]]) -> list[int]:
    keys = list(zip(columns["document"], columns["branch"], strict=True))
    text = [i for i, role in enumerate(columns["role"]) if role != IMAGE and keys[i][0] != PADDING]
    return [i for i in text if i + 1 == len(keys) or keys[i + 1] != keys[i]]
