"""Tokenizers, and a table of the token ids of all texts of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmvqa.data.cache import Arrays, Cache, as_array, as_text, code_fingerprint
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.ranks import bar

SPECIAL = ["<pad>", "<eos>", "<bos>"]  # ids 0, 1, 2 of a trained tokenizer
CHUNK = 8192  # texts per call: keeps all threads busy, and the library's Encoding objects take little memory
MIN_CACHED_TEXTS = 4096  # tokenizing fewer takes less time than hashing Gemma's tokenizer
BAR_DELAY = 2.0  # seconds


# --- tokenizers ---------------------------------------------------------------------------------------


def train_tokenizer(
    examples: Iterable[Example], vocabulary: int, cache: Cache | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocabulary` tokens on the questions and answers, or load it from the cache.

    Bytes are tokens, so no text is unknown.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(SPECIAL) + len(alphabet):
        raise InputError(
            f"a byte-level tokenizer needs at least {len(SPECIAL) + len(alphabet)} tokens, not {vocabulary}"
        )
    cache, counts = cache or Cache(), Counter(_texts(examples))
    versions = {"tokenizers": tokenizers.__version__, "code": code_fingerprint()}
    key = {"texts": list(counts.items()), "vocabulary": vocabulary, **versions}
    cached = cache.load("tokenizer", key)
    if cached is None:
        tokenizer = _train(counts, vocabulary, alphabet)
        cache.save("tokenizer", key, {"json": as_array(tokenizer.to_str())})
    else:
        tokenizer = Tokenizer.from_str(as_text(cached["json"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], bos_token=SPECIAL[2]
    )


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    """Yield every text that a model trained on these examples reads or generates."""
    for example in examples:
        for question in example.questions:
            yield question.prompt
            yield question.target or ""
            yield from question.answers


def _train(counts: Counter[str], vocabulary: int, alphabet: list[str]) -> Tokenizer:
    """Train on each text as often as it occurs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(counts.elements(), trainer)
    return tokenizer


# --- token ids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTable:
    """Token ids by text, without special tokens: text number n has `ids[starts[n] : starts[n + 1]]`.

    Two arrays, and a dict of strings that the examples hold anyway: a DataLoader's forked workers share them.
    """

    numbers: dict[str, int]
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def build(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, cache: Cache | None = None) -> TokenTable:
        """Tokenize each distinct text, on all cores if the tokenizer can, or load the table from the cache."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        distinct = list(numbers)
        if len(distinct) < MIN_CACHED_TEXTS or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return cls(numbers, **_tokenize(distinct, tokenizer))
        cache = cache or Cache()
        settings = [tokenizers.__version__, tokenizer.split_special_tokens, tokenizer.backend_tokenizer.to_str()]
        key = {"texts": distinct, "tokenizer": settings}
        columns = cache.load("tokens", key)
        if columns is None:
            columns = _tokenize(distinct, tokenizer)
            cache.save("tokens", key, columns)
        return cls(numbers, **columns)

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, text: str) -> list[int] | None:
        """Return the token ids of a text, or None if it is not in the table."""
        number = self.numbers.get(text)
        if number is None:
            return None
        ids: list[int] = self.ids[self.starts[number] : self.starts[number + 1]].tolist()
        return ids

    def lengths(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Return the number of tokens of each text, `int64[texts]`.

        Raises:
            KeyError: a text is not in the table.
        """
        numbers = np.fromiter((self.numbers[text] for text in texts), np.int64)
        return self.starts[numbers + 1] - self.starts[numbers]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Arrays:
    """Return the columns `ids` and `starts` of a `TokenTable`."""
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    with bar(doing="tokenizing", unit="texts", total=len(texts), delay=BAR_DELAY) as progress:
        for start in range(0, len(texts), CHUNK):
            # One call for several texts, which the Rust library tokenizes in its own threads.
            chunk = tokenizer(texts[start : start + CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
            ids.append(np.fromiter(chain.from_iterable(chunk), np.int32))
            lengths.append(np.array([len(text_ids) for text_ids in chunk], np.int64))
            progress.update(len(chunk))
    return {"ids": np.concatenate(ids), "starts": np.concatenate(lengths).cumsum()}
