# SPDX-License-Identifier: Apache-2.0
"""The router demo's load: tenants with system prompts of their own, and chats that return.

All chats of a tenant share its system prompt, which describes its tools. A chat sends its whole
history every turn, and between two turns of it all the others have spoken.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from openai import OpenAI

from sglang_diffxkv.eval.tasks.base import Scene, hide
from sglang_diffxkv.eval.tasks.words import HELD_OUT

_ANSWER_TOKENS = 16

Size = Callable[[str], int]
"""Tokens of a text."""


class Shape(NamedTuple):
    """How much load there is."""

    tenants: int = 6
    chats: int = 4
    """Of each tenant."""
    turns: int = 4
    """Of each chat, before a replica is killed."""
    system_tokens: int = 640
    turn_tokens: int = 96
    at_once: int = 4
    """Requests in flight."""


class Answered(NamedTuple):
    """What one request was answered with."""

    tenant: int
    replica: str
    """The name of the replica that answered."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, read from that replica's prefix cache."""
    at: float
    """When the answer came, as `time.monotonic()` counts."""
    seconds: float


class Chat:
    """One conversation; `say` is its next turn."""

    def __init__(self, load: int, tenant: int, number: int, shape: Shape, size: Size) -> None:
        self.tenant = tenant
        self._rng = random.Random(f"{tenant}/{number}")
        self._shape = shape
        self._size = size
        system = _system_prompt(tenant, shape.system_tokens, size)
        # Caches that outlive a load hold nothing of the next one.
        begin = {"role": "system", "content": f"Load {load}. {system}"}
        self._messages: list[Any] = [begin]

    def say(self, client: OpenAI) -> Answered:
        """Send the history and a new message."""
        text = hide(Scene(self._rng, HELD_OUT, self._shape.turn_tokens, 0, self._size), [])
        self._messages.append({"role": "user", "content": text})
        begin = time.monotonic()
        answer = client.chat.completions.create(
            model="default", messages=self._messages, max_tokens=_ANSWER_TOKENS, temperature=0
        )
        end = time.monotonic()
        content = answer.choices[0].message.content or ""
        self._messages.append({"role": "assistant", "content": content})
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        # SGLang's own field, beyond OpenAI's.
        replica = (answer.model_extra or {})["metadata"]["weight_version"]
        return Answered(self.tenant, replica, usage.prompt_tokens, cached, end, end - begin)


def open_chats(load: int, shape: Shape, size: Size) -> list[Chat]:
    """All chats, none of which has spoken: the same in every load, but for its number."""
    return [
        Chat(load, tenant, number, shape, size)
        for tenant in range(shape.tenants)
        for number in range(shape.chats)
    ]


def speak(client: OpenAI, chats: Sequence[Chat], at_once: int) -> Iterator[Answered]:
    """One turn of each of the `chats`, in their order; yields as the answers come."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda chat: chat.say(client), chats)


def shuffled(chats: Sequence[Chat], seed: int) -> list[Chat]:
    return random.Random(seed).sample(chats, len(chats))


def _system_prompt(tenant: int, tokens: int, size: Size) -> str:
    """Rules, and tools in JSON as chat templates write them, the same for a tenant's chats."""
    rng = random.Random(tenant)
    words = HELD_OUT.nouns
    tools = [
        {"name": f"{rng.choice(words)}_{rng.choice(words)}", "parameters": {"type": "object"}}
        for _ in range(2)
    ]
    rules = f"You work for tenant {tenant}. Tools: {json.dumps(tools)}"
    return hide(Scene(rng, HELD_OUT, tokens, 0, size), [rules])
