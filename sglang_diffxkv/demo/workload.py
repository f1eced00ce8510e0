# SPDX-License-Identifier: Apache-2.0
"""The demo's load: what several users would send, the same on every server.

Answers are of fixed length, so that servers whose texts differ still hold the same tokens.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from openai import OpenAI

from sglang_diffxkv.demo.measure import Counters, Held, Probe

# Chosen with `run.MEMORY_BYTES`: about twice what stock SGLang holds in that memory.
USERS = 8
FIRST_TURNS = 4
LATER_TURNS = 1
MESSAGE_BYTES = 300
ANSWER_TOKENS = 24
REPORT_BYTES = 2000
QUESTIONS = 17
QUESTION_BYTES = 40
FORMS = 4

FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "severity": {"enum": ["low", "medium", "high"]},
        "injured": {"type": "integer", "minimum": 0, "maximum": 99},
        "closed": {"type": "boolean"},
    },
    "required": ["city", "severity", "injured", "closed"],
    "additionalProperties": False,
}

_WHO = (
    "the crew",
    "a driver",
    "the harbour office",
    "our neighbour",
    "the night shift",
    "an engineer",
)
_DID = ("reported", "closed", "found", "repaired", "asked about", "could not open", "measured")
_WHAT = ("the north gate", "a broken valve", "the river bridge", "train seven", "the water main")
_WHEN = ("before dawn", "at noon", "after the storm", "last week", "an hour later", "twice")


class Stage(NamedTuple):
    """What one part of the load did to a server that is idle again."""

    name: str
    seconds: float
    counters: Counters
    """Of this part alone."""
    held: Held


class Conversation:
    """A user who chats through the OpenAI-compatible API; each turn sends the whole history."""

    def __init__(self, client: OpenAI, user: int) -> None:
        self._client = client
        self._rng = random.Random(user)
        self._messages: list[Any] = []

    def turn(self) -> None:
        message = _sentences(self._rng, MESSAGE_BYTES)
        self._messages.append({"role": "user", "content": message})
        answer = _chat(self._client, self._messages)
        self._messages.append({"role": "assistant", "content": answer})


def run_load(url: str, probe: Probe) -> Iterator[Stage]:
    """Send the load to the server at `url`; yields after each part."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chats = [Conversation(client, user) for user in range(USERS)]
    report = _sentences(random.Random("report"), REPORT_BYTES)

    def stage(name: str, part: Callable[[], None]) -> Stage:
        before, begin = probe.counters(), time.monotonic()
        part()
        seconds = time.monotonic() - begin
        return Stage(name, seconds, probe.counters().since(before), probe.held())

    for turn in range(FIRST_TURNS):
        yield stage(f"chat, turn {turn + 1}", lambda: _together(chat.turn for chat in chats))
    yield stage("shared prefix", lambda: _ask(client, report))
    yield stage("JSON schema", lambda: _fill_forms(client, report))
    yield stage("sgl.function", lambda: _run_program(url, report))
    for turn in range(FIRST_TURNS, FIRST_TURNS + LATER_TURNS):
        yield stage(f"chat, turn {turn + 1}", lambda: _together(chat.turn for chat in chats))


def _ask(client: OpenAI, report: str) -> None:
    """Many questions about one long report, which all prompts start with."""
    rng = random.Random("questions")
    system = {"role": "system", "content": report}
    prompts = [
        [system, {"role": "user", "content": _sentences(rng, QUESTION_BYTES)}]
        for _ in range(QUESTIONS)
    ]
    # Alone, as the user who opens the report does: requests sent at once cannot share it yet.
    _chat(client, prompts[0])
    _together(lambda messages=messages: _chat(client, messages) for messages in prompts[1:])


def _fill_forms(client: OpenAI, report: str) -> None:
    """Structured generation: each answer is parsed and checked against the schema's keys."""
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "form", "schema": FORM_SCHEMA, "strict": True},
    }

    def fill(number: int) -> None:
        messages = [
            {"role": "system", "content": report},
            {"role": "user", "content": f"Fill in form {number} as JSON."},
        ]
        text = _chat(client, messages, max_tokens=120, response_format=response_format)
        form = json.loads(text)
        if sorted(form) != sorted(FORM_SCHEMA["required"]):
            raise RuntimeError(f"an answer does not follow the schema: {text}")

    _together(lambda number=number: fill(number) for number in range(FORMS))


def _run_program(url: str, report: str) -> None:
    # Imported here: it loads the whole of SGLang, which takes seconds.
    from sglang_diffxkv.demo.program import review

    # As the chat template writes it, so that the program's prompts share the report's pages.
    review(url, f"<|system|>{report}<|end|>")


def _chat(
    client: OpenAI, messages: list[Any], max_tokens: int = ANSWER_TOKENS, **options: Any
) -> str:
    fixed_length = "response_format" not in options
    answer = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": fixed_length},
        **options,
    )
    return answer.choices[0].message.content or ""


def _together(calls: Any) -> None:
    """Make all calls, `USERS` at a time, and raise what any of them raises."""
    with ThreadPoolExecutor(USERS) as pool:
        list(pool.map(lambda call: call(), calls))


def _sentences(rng: random.Random, length: int) -> str:
    """Text of `length` characters; the embedded model's tokenizer makes one token of each."""
    text = ""
    while len(text) < length:
        text += " ".join(map(rng.choice, (_WHO, _DID, _WHAT, _WHEN))).capitalize() + ". "
    return text[:length]
