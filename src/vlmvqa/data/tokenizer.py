"""Tokenizers: the language model's own, or for random weights one trained on the questions and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, unread


def train_tokenizer(examples: Iterable[Example], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens (nothing is unknown to it); ids 0, 1, 2: pad, EOS, BOS."""

    def texts() -> Iterator[str]:
        for example in examples:
            for question in example.questions:
                yield question.prompt
                yield question.target or ""
                yield from question.answers

    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(special) + len(alphabet):
        raise InputError(
            f"a byte-level tokenizer needs at least {len(special) + len(alphabet)} tokens, not {vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], bos_token=special[2]
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder.

    Raises:
        InputError: it cannot be read, or has no EOS token to end answers with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"the tokenizer of {name}", error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no EOS token, which ends every answer; choose another")
    return tokenizer
