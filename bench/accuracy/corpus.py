# SPDX-License-Identifier: Apache-2.0
"""Training chats made on the fly: a task's context, then as many of its questions as fit."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from bench.accuracy.tokenizer import spaced
from sglang_diffxkv.eval.tasks.base import Scene
from sglang_diffxkv.eval.tasks.registry import TASKS
from sglang_diffxkv.eval.tasks.words import TRAIN, WORDS

CONTEXT_WEIGHT = 0.1
"""Of a context token in the loss, relative to one of an answer: most are random words."""
CONTEXT_SHARE = 0.25
"""Of context tokens that are predicted at all: logits are a good part of the work."""
DRILL = "drill"
"""Not a task: pairs in many forms, again and again, with every repeated value to be predicted.

Answers are a small part of a chat; this teaches to look up content from far more of them."""
_FORMS = (
    "{} {}",
    "{} = {},",
    "The code of {} is {}.",
    "Copy {} to {}.",
    "{} is {},",
)
_SPAN = (3, 12)
_SHARE = (0.35, 0.85)
"""Of a chat that its context takes: drawn anew for each, so that no distance is the rule."""


class Chat(NamedTuple):
    """Token ids and their weights in the loss, of equal length."""

    task: str
    ids: list[int]
    weights: list[float]
    answers: list[tuple[int, int]]
    """First and past-the-last index of each answer, its end token included."""


class Batch(NamedTuple):
    """Chats padded to one length: int64 and float32 [B, T], and what they are."""

    ids: torch.Tensor
    weights: torch.Tensor
    chats: list[Chat]


class Corpus:
    """Endless training data; the same seed gives the same chats."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)

    def batch(self, length: int, tokens: int, mix: dict[str, float]) -> Batch:
        """About `tokens` tokens in chats of at most `length`; `mix` has each task's weight."""
        names = self._rng.choices(list(mix), list(mix.values()), k=max(1, tokens // length))
        chats = [
            self._drill(length) if name == DRILL else self._chat(name, length) for name in names
        ]
        ids = torch.zeros(len(chats), length, dtype=torch.int64)
        weights = torch.zeros(len(chats), length)
        for i, chat in enumerate(chats):
            ids[i, : len(chat.ids)] = torch.tensor(chat.ids)
            weights[i, : len(chat.ids)] = torch.tensor(chat.weights)
        return Batch(ids, weights, chats)

    def _chat(self, task: str, length: int) -> Chat:
        budget = int(length * self._rng.uniform(*_SHARE)) - 16
        scene = Scene(self._rng, TRAIN, max(budget, 8), max(4, length // 10), self._size)
        sample = TASKS[task](scene)
        chat = Chat(task, [], [], [])
        for i, question in enumerate(sample.questions):
            turns = sample.messages(question) if i == 0 else (("user", question.text),)
            ids = [token for role, text in turns for token in self._turn(role, f" {text}")]
            answer = self._turn("assistant", spaced(question.answer))
            if len(chat.ids) + len(ids) + len(answer) > length:
                break
            # The role's token opens the answer; it is given, not predicted.
            begin, end = len(chat.ids) + len(ids) + 1, len(chat.ids) + len(ids) + len(answer)
            chat.ids.extend(ids + answer)
            chat.weights.extend(self._context_weight() for _ in range(len(ids) + 1))
            chat.weights.extend([1.0] * (len(answer) - 1))
            chat.answers.append((begin, end))
        return chat if chat.answers else self._chat(task, length)

    def _context_weight(self) -> float:
        return CONTEXT_WEIGHT if self._rng.random() < CONTEXT_SHARE else 0.0

    def _drill(self, length: int) -> Chat:
        rng = self._rng
        chat = Chat(DRILL, [], [], [])
        if rng.random() < 0.3:
            self._spans(chat, length)
        else:
            self._pairs(chat, length)
        return chat

    def _pairs(self, chat: Chat, length: int) -> None:
        """Some pairs in one form, then the same pairs in random order until the chat is full."""
        rng, form = self._rng, self._rng.choice(_FORMS)
        size = self._size(" " + form.format("apple", "apple"))
        count = rng.randint(2, max(2, int(0.6 * length / size)))
        keys = rng.sample(WORDS, min(count, len(WORDS)))
        facts = [(key, rng.choice(WORDS)) for key in keys]
        order = [*facts, *(rng.choice(facts) for _ in range(length // size - len(facts)))]
        # The value is the last word of every form.
        last = size - 1 - (not form.endswith("}"))
        for i, fact in enumerate(order):
            begin = len(chat.ids)
            chat.ids.extend(self._encode(" " + form.format(*fact)))
            chat.weights.extend([0.0] * size)
            if i >= len(facts):
                chat.weights[begin + last] = 1.0
                chat.answers.append((begin + last, begin + last + 1))

    def _spans(self, chat: Chat, length: int) -> None:
        """Random words in which spans of earlier ones come again."""
        rng = self._rng
        fresh = min(rng.randint(length // 4, length // 2), len(WORDS))
        ids = self._encode(" " + " ".join(rng.sample(WORDS, fresh)))
        chat.ids.extend(ids)
        chat.weights.extend([0.0] * len(ids))
        while len(chat.ids) < length:
            start = rng.randrange(fresh)
            span = ids[start : start + rng.randint(*_SPAN)][: length - len(chat.ids)]
            begin = len(chat.ids)
            chat.ids.extend(span)
            chat.weights.extend([0.0] + [1.0] * (len(span) - 1))
            if len(span) > 1:
                chat.answers.append((begin + 1, begin + len(span)))

    def _turn(self, role: str, text: str) -> list[int]:
        return self._encode(f"<|{role}|>{text}<|end|>")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _size(self, text: str) -> int:
        return len(self._encode(text))
