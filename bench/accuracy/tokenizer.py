# SPDX-License-Identifier: Apache-2.0
"""The trained demo model's tokenizer: bytes, and one token for each word that the tasks use."""

from __future__ import annotations

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sglang_diffxkv.eval.tasks.base import Scene
from sglang_diffxkv.eval.tasks.records import FIELDS
from sglang_diffxkv.eval.tasks.registry import TASKS
from sglang_diffxkv.eval.tasks.words import EVERY, HELD_OUT, TRAIN
from tests.support.demo_model import SPECIAL_TOKENS, byte_vocab

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|> ' + (m['content'] | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SAMPLES_PER_TASK = 64


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: what is not in the vocabulary as a whole is spelt in bytes.

    Ids 0-255 are bytes, then `SPECIAL_TOKENS`, then words and punctuation, most with the space
    before them.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocab = byte_vocab()
    words = sorted({piece for text in _texts() for piece, _ in split.pre_tokenize_str(text)})
    # The specials' ids must come first, so that a longer list of words leaves them as they are.
    first = len(vocab) + len(SPECIAL_TOKENS)
    vocab |= {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {word: first + i for i, word in enumerate(w for w in words if w not in vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def spaced(answer: str) -> str:
    """An answer as the model writes it: words with a space, JSON as grammars want it, without."""
    return answer if answer.startswith("{") else f" {answer}"


def _texts() -> list[str]:
    """Texts in which every word occurs that a task can use."""
    rng = random.Random(0)
    texts = [f" {word}" for word in EVERY]
    # In JSON, words stand without a space before them.
    texts += [word for field, values in FIELDS.items() for word in (field, *values)]
    for make in TASKS.values():
        for i in range(_SAMPLES_PER_TASK):
            sample = make(Scene(rng, (TRAIN, HELD_OUT)[i % 2], 200, 8, len))
            texts += [f" {text}" for _, text in sample.context]
            texts += [f" {question.text}" for question in sample.questions]
            for question in sample.questions:
                texts.append(spaced(question.answer))
    return texts
