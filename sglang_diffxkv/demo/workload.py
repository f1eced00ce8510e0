# SPDX-License-Identifier: Apache-2.0
"""The demo's load: what several users would send, the same on every server, with known answers."""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from openai import OpenAI

from sglang_diffxkv.demo.measure import Counters, Held, Probe
from sglang_diffxkv.eval.tasks.base import Sample, Scene, hide
from sglang_diffxkv.eval.tasks.recall import ATTRIBUTES, PEOPLE, REPLY
from sglang_diffxkv.eval.tasks.records import FIELDS
from sglang_diffxkv.eval.tasks.registry import TASKS
from sglang_diffxkv.eval.tasks.words import HELD_OUT

# Chosen with `run.MEMORY_BYTES`: about twice what stock SGLang holds in that memory.
USERS = 8
TOLD_TURNS = 3
TURN_TOKENS = 350
REPORT_TOKENS = 2000
QUESTIONS = 17
RECORD_TOKENS = 250
FORMS = 4
TABLE_TOKENS = 1000
FORKS = 3

FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {field: {"enum": list(values)} for field, values in FIELDS.items()},
    "required": list(FIELDS),
    "additionalProperties": False,
}

Size = Callable[[str], int]


class Score(NamedTuple):
    """Answers that were exactly right, of those that can be; none where nobody knows."""

    right: int
    asked: int


class Stage(NamedTuple):
    """What one part of the load did to a server that is idle again."""

    name: str
    seconds: float
    score: Score
    counters: Counters
    """Of this part alone."""
    held: Held


class Conversation:
    """A user who tells facts in long messages, and asks for them later.

    Each turn sends the whole history through the OpenAI-compatible API.
    """

    def __init__(self, client: OpenAI, user: int, size: Size) -> None:
        rng = random.Random(user)
        self._client = client
        self._scene = Scene(rng, HELD_OUT, TURN_TOKENS, 1, size)
        self._messages: list[Any] = []
        people = rng.sample(PEOPLE, TOLD_TURNS)
        kinds = rng.choices(list(ATTRIBUTES), k=TOLD_TURNS)
        self._facts = [
            (f"{kind} of my {who}", rng.choice(ATTRIBUTES[kind]))
            for kind, who in zip(kinds, people, strict=True)
        ]

    def tell(self, turn: int) -> bool:
        """Tell the fact of that turn; whether it was acknowledged."""
        fact, value = self._facts[turn]
        return self._say(hide(self._scene, [f"The {fact} is {value}."])) == REPLY

    def ask(self, turn: int) -> bool:
        """Ask for what was told in that turn; whether the answer is right."""
        fact, value = self._facts[turn]
        return self._say(f"What is the {fact}?") == value

    def _say(self, text: str) -> str:
        self._messages.append({"role": "user", "content": text})
        answer = chat(self._client, self._messages)
        self._messages.append({"role": "assistant", "content": answer})
        return answer


def run_load(url: str, probe: Probe, size: Size) -> Iterator[Stage]:
    """Send the load to the server at `url`; yields after each part.

    Args:
        size: tokens of a text.
    """
    client = connect(url)
    chats = [Conversation(client, user, size) for user in range(USERS)]

    for turn in range(TOLD_TURNS):
        yield measure(
            f"chat, turn {turn + 1}",
            probe,
            partial(_together, partial(Conversation.tell, turn=turn), chats),
        )
    yield measure("chat, question 1", probe, lambda: _together(lambda chat: chat.ask(0), chats))
    yield measure("shared prefix", probe, lambda: _ask(client, size))
    yield measure("JSON schema", probe, lambda: _fill_forms(client, size))
    yield measure("sgl.function", probe, lambda: _run_program(url, size))
    yield measure("chat, question 2", probe, lambda: _together(lambda chat: chat.ask(1), chats))


def measure(name: str, probe: Probe, part: Callable[[], Iterable[bool]]) -> Stage:
    """Run a `part` of a load, which returns for each answer whether it is right."""
    before, begin = probe.counters(), time.monotonic()
    right = list(part())
    seconds = time.monotonic() - begin
    score = Score(sum(right), len(right))
    return Stage(name, seconds, score, probe.counters().since(before), probe.held())


def _ask(client: OpenAI, size: Size) -> list[bool]:
    """Many questions about one long report, which all prompts start with."""
    report = _sample("niah_multikey", REPORT_TOKENS, QUESTIONS, size)

    def ask(number: int) -> bool:
        question = report.questions[number]
        return chat(client, _messages(report, number)) == question.answer

    # Alone, as the user who opens the report does: requests sent at once cannot share it yet.
    return [ask(0), *_together(ask, range(1, len(report.questions)))]


def _fill_forms(client: OpenAI, size: Size) -> list[bool]:
    """Structured generation: each answer is parsed, and compared with the record in the text."""
    schema = {"name": "record", "schema": FORM_SCHEMA, "strict": True}
    response_format = {"type": "json_schema", "json_schema": schema}

    def fill(number: int) -> bool:
        sample = _sample("record", RECORD_TOKENS, 1, size, seed=number)
        text = chat(client, _messages(sample, 0), response_format=response_format)
        form = json.loads(text)
        if sorted(form) != sorted(FIELDS):
            raise RuntimeError(f"an answer does not follow the schema: {text}")
        return bool(form == json.loads(sample.questions[0].answer))

    return _together(fill, range(FORMS))


def _run_program(url: str, size: Size) -> list[bool]:
    # Imported here: it loads the whole of SGLang, which takes seconds.
    from sglang_diffxkv.demo.program import review

    table = _sample("kv_lookup", TABLE_TOKENS, FORKS, size)
    answers = [question.answer for question in table.questions]
    found = review(url, table.context[0][1], list(table.questions), answers)
    right = [given == answer for given, answer in zip(found.answers, answers, strict=True)]
    return [*right, found.choice == answers[-1]]


def _sample(task: str, tokens: int, questions: int, size: Size, seed: int = 0) -> Sample:
    return TASKS[task](Scene(random.Random(seed), HELD_OUT, tokens, questions, size))


def _messages(sample: Sample, number: int) -> list[Any]:
    asked = sample.messages(sample.questions[number])
    return [{"role": role, "content": text} for role, text in asked]


def connect(url: str) -> OpenAI:
    """The OpenAI-compatible API of the server at `url`."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, messages: list[Any], max_tokens: int = 64, **options: Any) -> str:
    """The answer to a conversation, greedily."""
    answer = client.chat.completions.create(
        model="default", messages=messages, max_tokens=max_tokens, temperature=0, **options
    )
    return (answer.choices[0].message.content or "").strip()


def _together(call: Callable[[Any], bool], items: Iterable[Any]) -> list[bool]:
    """`call` for all items, `USERS` at a time; raises what any of them raises."""
    with ThreadPoolExecutor(USERS) as pool:
        return list(pool.map(call, items))
