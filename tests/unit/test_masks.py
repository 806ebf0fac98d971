"""Which tokens see which, as sentences; and that no later token changes an earlier one (promise 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tests import tiny
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence import masks
from vlmvqa.sequence.masks import Tokens, block_mask, dense_mask, visible
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, SHAREABLE, Document, TokenizedQuestion, build_row, pad_rows

WORDS = {1: "what", 2: "color", 3: "red", 4: "how", 5: "many", 6: "two", 7: "of", 8: "them"}


def sees(attention_pattern: str, shared: bool = True, window: int | None = None) -> dict[str, str]:
    """For every word of a small row, the words it sees, in order; `i` is an image token."""
    questions = [TokenizedQuestion([1, 2], [3, 9]), TokenizedQuestion([4, 5], [6, 7, 9])]
    rows = pad_rows([build_row([Document([0], questions if shared else questions[:1])], 2, attention_pattern)])
    tokens = Tokens.of(rows)
    mask = visible(tokens.map(lambda t: t[0, :, None]), tokens.map(lambda t: t[0, None, :]), window)
    names = [WORDS.get(token, "i") for token in rows["input_ids"][0].tolist()]
    return {name: " ".join(n for n, seen in zip(names, mask[q], strict=True) if seen) for q, name in enumerate(names)}


def test_causal() -> None:
    assert sees("causal") == {
        "i": "i i",
        "what": "i i what",
        "color": "i i what color",
        "red": "i i what color red",
        "how": "i i how",
        "many": "i i how many",
        "two": "i i how many two",
        "of": "i i how many two of",
    }


def test_image_prefix_lets_image_tokens_see_each_other() -> None:
    for attention_pattern, expected in (("causal", [1, 2, 3]), ("image_prefix", [3, 3, 3])):
        tokens = Tokens.of(pad_rows([build_row(tiny.documents([1]), 3, attention_pattern)]))
        mask = dense_mask(tokens, tokens)[0, 0]
        assert mask[:3].sum(1).tolist() == expected


def test_blockwise_prefix_lets_a_question_see_itself_both_ways() -> None:
    seen = sees("blockwise_prefix")
    assert seen["what"] == "i i what color"
    assert seen["how"] == "i i how many"
    assert seen["two"] == "i i how many two"
    assert seen["i"] == "i i"


def test_prefix_lm_lets_the_image_see_the_question_but_not_the_answer() -> None:
    seen = sees("prefix_lm", shared=False)
    assert seen["i"] == seen["what"] == "i i what color"
    assert seen["red"] == "i i what color red"


# The bidirectional blocks of image, prompt and answer (-1: causal), the same for all segments of a role.
BY_ROLE = {"causal": (-1, -1), "image_prefix": (0, -1), "blockwise_prefix": (0, 1), "prefix_lm": (0, 0)}


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_blocks_of_segments_give_the_mask_of_blocks_of_roles(attention_pattern: str) -> None:
    given = tiny.documents([1, 1] if attention_pattern == "prefix_lm" else [3, 2])
    rows = pad_rows([build_row(given, 4, attention_pattern), build_row(given[:1], 4, attention_pattern)])
    tokens, blocks = Tokens.of(rows), torch.tensor([*BY_ROLE[attention_pattern], -1])
    by_role = tokens._replace(block=blocks[rows["role"]])
    for window in (None, 5):
        assert torch.equal(dense_mask(tokens, tokens, window), dense_mask(by_role, by_role, window))


def test_the_window_counts_restarted_positions() -> None:
    """The second question sees as far back as it would alone, though more tokens lie between."""
    seen = sees("causal", window=3)
    assert seen["how"] == "i i how"
    assert seen["of"] == "many two of"


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_spans_reach_exactly_as_far_as_any_row_sees(attention_pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SPAN", 3)
    given = tiny.documents([1, 1] if attention_pattern == "prefix_lm" else [3, 2])
    rows = pad_rows([build_row(given, 4, attention_pattern), build_row(given[:1], 4, attention_pattern)], multiple=64)
    found = Tokens.of(rows)
    seen = visible(found.map(lambda t: t[:, :, None]), found.map(lambda t: t[:, None, :]))
    spans = masks.key_spans(found)
    places = torch.arange(seen.shape[1])
    assert torch.equal(torch.cat([places[queries] for queries, _ in spans]), places)
    for queries, keys in spans:
        part = seen[:, queries].any(0).any(0)  # of any row and any query
        hidden = torch.ones_like(part).index_fill(0, places[keys], False)
        assert not part[hidden].any() and len(places[keys]) >= 1
        assert len(places[keys]) == 1 or (part[keys.start] and part[keys.stop - 1])
    assert any(keys.start > 0 for _, keys in spans)  # of the second document


def test_padding_is_seen_by_nobody_and_gives_no_nan() -> None:
    rows = pad_rows([build_row(tiny.documents([1]), 3, "causal")], multiple=16)
    tokens = Tokens.of(rows)
    real = rows["document"][0] >= 0
    mask = dense_mask(tokens, tokens)[0, 0]
    assert not mask[real][:, ~real].any()
    assert mask.any(-1).all()


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("window", [None, 5])
def test_the_block_mask_is_the_dense_mask(attention_pattern: str, window: int | None) -> None:
    given = tiny.documents([1, 1] if attention_pattern == "prefix_lm" else [3, 2])
    rows = pad_rows([build_row(given, 4, attention_pattern), build_row(given[:1], 4, attention_pattern)], multiple=64)
    tokens = Tokens.of(rows)
    flex = block_mask(tokens, window)
    row, query, key = torch.meshgrid(*(torch.arange(n) for n in (2, 64, 64)), indexing="ij")
    spelled_out = flex.mask_mod(row, torch.zeros(()), query, key)
    real = (rows["document"] >= 0)[:, :, None]
    assert torch.equal(spelled_out & real, dense_mask(tokens, tokens, window)[:, 0] & real)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("multiple", [64, 128])
def test_the_block_mask_is_that_of_pytorch(window: int | None, multiple: int) -> None:
    documents = tiny.documents([3, 9, 20, 3, 8, 5])
    rows = pad_rows([build_row(row, 4, "blockwise_prefix") for row in (documents, documents[:3])], multiple)
    tokens = Tokens.of(rows)

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(tokens.map(lambda t: t[row, query]), tokens.map(lambda t: t[row, key]), window)

    length = tokens.position.shape[1]
    found, expected = block_mask(tokens, window), create_block_mask(may_see, 2, None, length, length, device="cpu")
    assert found.shape == expected.shape and found.sparsity() == expected.sparsity() and 20 < found.sparsity() < 95
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "full_q_indices",
    ):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def earlier_is_unchanged(vlm: VLM, rows: dict[str, torch.Tensor], at: int) -> None:
    """Change the token at `at`; every position that may not see it keeps its hidden state."""
    changed = {name: column.clone() for name, column in rows.items()}
    changed["input_ids"][0, at] = (changed["input_ids"][0, at] + 7) % tiny.VOCABULARY
    with torch.no_grad():
        before, after = vlm.decode(rows)[0], vlm.decode(changed)[0]
    tokens = vlm.tokens(rows)
    # What a layer may see at one step it may pass on: reach is the closure of sight over the layers.
    sight = visible(tokens.map(lambda t: t[0, :, None]), tokens.map(lambda t: t[0, None, :]))
    may_change = torch.linalg.matrix_power(sight.double(), 8)[:, at] > 0
    real = rows["document"][0] >= 0
    assert may_change[at] and not may_change[real].all()
    moved = (before - after).abs().amax(-1)
    assert moved[at] > 1e-3
    torch.testing.assert_close(before[~may_change & real], after[~may_change & real], rtol=0, atol=1e-5)


def assert_later_tokens_change_nothing_earlier(attention_pattern: str, backend: str) -> None:
    vlm = tiny.model(attention_pattern)
    vlm.language.set_attention(backend)
    given = tiny.documents([1] if attention_pattern == "prefix_lm" else [3])
    rows = tiny.batch(vlm, [given], tiny.images(1))
    answers = (rows["role"][0] == 2).nonzero()[:, 0].tolist()
    for at in answers[:: 1 if backend == "dense" else 2]:
        earlier_is_unchanged(vlm, rows, at)


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_a_later_token_never_changes_an_earlier_one(attention_pattern: str) -> None:
    assert_later_tokens_change_nothing_earlier(attention_pattern, "dense")


@pytest.mark.parametrize("attention_pattern", SHAREABLE)
def test_a_question_never_changes_its_neighbours(attention_pattern: str) -> None:
    vlm = tiny.model(attention_pattern)
    rows = tiny.batch(vlm, [tiny.documents([3, 2])], tiny.images(2))
    for at in (rows["role"][0] == 1).nonzero()[:, 0].tolist()[:6]:
        earlier_is_unchanged(vlm, rows, at)
