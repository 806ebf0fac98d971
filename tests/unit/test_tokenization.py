"""TokenTable and trained tokenizers: equal to tokenizing each text alone, and cached."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from vlmvqa.data import tokenization
from vlmvqa.data.cache import Cache
from vlmvqa.data.example import Example, Question
from vlmvqa.data.tokenization import TokenTable, train_tokenizer

TEXTS = ["answer en What colour is the café?\n", "rouge", "", "日本 🐈", "<bos>", "rouge", " two  spaces\t"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and a cache even of few texts."""
    monkeypatch.setattr(tokenization, "CHUNK", 4)
    monkeypatch.setattr(tokenization, "MIN_CACHED_TEXTS", 2)


def train(*texts: str) -> PreTrainedTokenizerFast:
    return train_tokenizer([Example(b"", 1, tuple(Question(1, text, text) for text in texts))], 300)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train(*TEXTS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def test_each_text_has_the_tokens_that_it_has_alone(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    alone = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS}
    for _ in range(2):  # built, and from the cache
        table = TokenTable.build(iter(TEXTS), tokenizer, cache)
        assert {text: table.get(text) for text in TEXTS} == alone
        lengths = table.lengths(TEXTS)
        assert lengths.tolist() == [len(alone[text]) for text in TEXTS] and lengths.dtype == np.int64
        assert len(table) == 6 and table.ids.dtype == np.int32


def test_a_text_that_is_not_in_the_table_is_none_or_an_error(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    for table in (TokenTable.build(TEXTS, tokenizer, cache), TokenTable.build([], tokenizer, cache)):
        assert table.get("unknown") is None
        with pytest.raises(KeyError):
            table.lengths(["unknown"])
        assert table.lengths([]).tolist() == []


def test_the_tokenizers_truncation_and_padding_are_ignored(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    expected = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert TokenTable.build(TEXTS, tokenizer, cache).get(TEXTS[0]) == expected


def kept(cache: Cache) -> int:
    assert cache.folder is not None
    return len(list(cache.folder.iterdir()))


def test_the_second_build_tokenizes_nothing(
    tokenizer: PreTrainedTokenizerFast, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    TokenTable.build(TEXTS, tokenizer, cache)
    monkeypatch.setattr(tokenization, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    same = train(*TEXTS)  # as in another process
    assert TokenTable.build(TEXTS, same, cache).get("rouge") == same("rouge")["input_ids"]


def test_other_texts_and_other_tokenizers_are_other_entries(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    TokenTable.build(TEXTS, tokenizer, cache)
    assert TokenTable.build(TEXTS[::-1], tokenizer, cache).get("rouge") == tokenizer("rouge")["input_ids"]
    TokenTable.build(["ab", "c"], tokenizer, cache)
    TokenTable.build(["a", "bc"], tokenizer, cache)
    other = train("rouge")
    assert TokenTable.build(TEXTS, other, cache).get("rouge") == other("rouge")["input_ids"]
    assert kept(cache) == 5


def test_added_tokens_make_another_tokenizer(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    TokenTable.build(TEXTS, tokenizer, cache)
    tokenizer.add_tokens(["日本"])
    expected = tokenizer("日本 🐈", add_special_tokens=False)["input_ids"]
    assert TokenTable.build(TEXTS, tokenizer, cache).get("日本 🐈") == expected


def test_few_texts_are_not_kept(
    tokenizer: PreTrainedTokenizerFast, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "MIN_CACHED_TEXTS", 100)
    assert TokenTable.build(TEXTS, tokenizer, cache).get("rouge") == tokenizer("rouge")["input_ids"]
    assert kept(cache) == 0


def test_a_tokenizer_written_in_python_works_too(cache: Cache) -> None:
    tokenizer = ByT5Tokenizer()
    table = TokenTable.build(TEXTS, tokenizer, cache)
    assert {text: table.get(text) for text in TEXTS} == {
        text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    }
    assert kept(cache) == 0


def test_a_table_can_be_pickled(tokenizer: PreTrainedTokenizerFast, cache: Cache) -> None:
    table = TokenTable.build(TEXTS, tokenizer, cache)
    assert pickle.loads(pickle.dumps(table)).get("rouge") == table.get("rouge")


WORKERS = """
import sys
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from vlmvqa.data.tokenization import TokenTable

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = [f"is it number {number}?" for number in range(20_000)]
table = TokenTable.build(texts, tokenizer)

class Rows:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        new = tokenizer([f"new {index}"] * 500, add_special_tokens=False)["input_ids"]
        return len(new), table.get(texts[index]) == tokenizer(texts[index], add_special_tokens=False)["input_ids"]

assert [list(row) for row in DataLoader(Rows(), batch_size=None, num_workers=2)] == [[500, True]] * 64
"""


@pytest.mark.slow
def test_workers_forked_after_building_tokenize_without_warnings(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rust's threads do not survive a fork, which must cause neither a warning nor a deadlock."""
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", WORKERS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "tokenizing" not in line]  # a slow machine shows its bar
    assert (done.returncode, said) == (0, [])


def test_a_tokenizer_is_trained_once_for_the_same_texts(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(b"", 1, tuple(Question(1, text, text, text, ("rouge",)) for text in TEXTS if text))]
    trained = train_tokenizer(examples, 300, cache)
    monkeypatch.setattr(tokenization, "_train", lambda *_: pytest.fail("trained again"))
    known = train_tokenizer(iter(examples), 300, cache)
    assert known.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert (known.pad_token_id, known.eos_token_id, known.bos_token_id) == (0, 1, 2)
    for other, vocabulary in ((examples * 2, 300), (examples, 301)):  # the merges depend on the counts
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            train_tokenizer(other, vocabulary, cache)
