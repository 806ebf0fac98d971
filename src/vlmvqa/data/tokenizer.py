"""Tokenizers: the language model's own, or for random weights one trained on the questions and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmvqa.data.cache import Cache, code, pack, unpack
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, hub_or_cache, unread

SPECIAL = ["<pad>", "<eos>", "<bos>"]


def train_tokenizer(
    examples: Iterable[Example], vocabulary: int, cache: Cache | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens (nothing is unknown to it); ids 0, 1, 2: pad, EOS, BOS.

    It is trained once for the same texts: the cache keeps the result.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(SPECIAL) + len(alphabet):
        raise InputError(
            f"a byte-level tokenizer needs at least {len(SPECIAL) + len(alphabet)} tokens, not {vocabulary}"
        )
    cache, counts = cache or Cache(), Counter(_texts(examples))
    versions = {"tokenizers": tokenizers.__version__, "code": code()}
    key = {"texts": list(counts.items()), "vocabulary": vocabulary, **versions}
    known = cache.load("tokenizer", key)
    if known is None:
        tokenizer = _train(counts, vocabulary, alphabet)
        cache.save("tokenizer", key, pack([tokenizer.to_str()]))
    else:
        tokenizer = Tokenizer.from_str(unpack(known)[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], bos_token=SPECIAL[2]
    )


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    """Every text that a model trained on these examples reads or writes."""
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


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder.

    Raises:
        InputError: it cannot be read, or has no EOS token to end answers with.
    """
    try:
        with hub_or_cache(name):
            tokenizer = AutoTokenizer.from_pretrained(name, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"the tokenizer of {name}", error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no EOS token, which ends every answer; choose another")
    return tokenizer
