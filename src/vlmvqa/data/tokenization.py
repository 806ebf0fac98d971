"""All texts of a split as token ids, tokenised once: for planning the rows, and for every epoch after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmvqa.data.cache import Cache, Columns, pack
from vlmvqa.progress import bar

CHUNK = 8192  # texts at a time: enough for all threads, and little memory for what the library returns beside the ids
FEW = 4096  # below, tokenising takes less than a fingerprint of Gemma's tokenizer
BAR_AFTER = 2.0  # seconds

_fingerprints: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenTable:
    """Token ids by text, without special tokens: text number n has `ids[starts[n] : starts[n + 1]]`.

    Two arrays and a dict of strings that the examples hold anyway: a DataLoader's forked workers share them.
    """

    numbers: dict[str, int]
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def build(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, cache: Cache | None = None) -> TokenTable:
        """Tokenise each different text, on all cores where the tokenizer can, or take it from the cache."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        different = list(numbers)
        if len(different) < FEW or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return cls(numbers, **_tokenize(different, tokenizer))
        cache = cache or Cache()
        key = {"texts": _digest(*(column.tobytes() for column in pack(different).values()))}
        key["tokenizer"] = fingerprint(tokenizer)
        columns = cache.load("tokens", key)
        if columns is None:
            columns = _tokenize(different, tokenizer)
            cache.save("tokens", key, columns)
        return cls(numbers, **columns)

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, text: str) -> list[int] | None:
        """The token ids of a text; None if it is not in the table."""
        number = self.numbers.get(text)
        if number is None:
            return None
        found: list[int] = self.ids[self.starts[number] : self.starts[number + 1]].tolist()
        return found

    def lengths(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Tokens of each text, `int64[texts]`.

        Raises:
            KeyError: one is not in the table.
        """
        places = np.fromiter((self.numbers[text] for text in texts), np.int64)
        return self.starts[places + 1] - self.starts[places]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides what a tokenizer makes of a text; Gemma's 30 MB are hashed once a process."""
    size, digest = _fingerprints.get(tokenizer, (None, ""))
    if size != len(tokenizer):  # tokens were added
        settings = f"{tokenizers.__version__} {tokenizer.split_special_tokens}"
        digest = _digest(settings.encode(), tokenizer.backend_tokenizer.to_str().encode())
        _fingerprints[tokenizer] = len(tokenizer), digest
    return digest


def _digest(*parts: bytes) -> str:
    digest = blake2b(digest_size=20)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Columns:
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    with bar(doing="tokenising", unit="texts", total=len(texts), delay=BAR_AFTER) as progress:
        for start in range(0, len(texts), CHUNK):
            found = _tokenize_chunk(texts[start : start + CHUNK], tokenizer)
            ids.append(np.fromiter(chain.from_iterable(found), np.int32))
            lengths.append(np.array([len(one) for one in found], np.int64))
            progress.update(len(found))
    return {"ids": np.concatenate(ids), "starts": np.concatenate(lengths).cumsum()}


def _tokenize_chunk(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # All of a list at once, in the Rust library's own threads.
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return found
