# SPDX-License-Identifier: Apache-2.0
"""The demo's load for a model that chats: several users, each of whom talks about a document.

No answer is known beforehand: what full KV says is what others are compared with. So all servers
are told the same histories, with the answers that full KV gave.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pydoc_data.topics import topics

from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.workload import Stage, chat, connect, measure
from sglang_diffxkv.eval.ask import together

TOPICS = ("naming", "raise", "objects", "async", "function")
"""Of Python's own documentation, as `help()` has it: 900 to 1,500 tokens each for SmolLM2."""
TURNS = (
    "What is this text about? Answer in one sentence.",
    "What should a beginner remember of it?",
    "Give a short example of what it describes.",
    "Which word of the text would you look up first, and why?",
)
QUESTIONS = (
    "What happens when a name is not found?",
    "What is a block?",
    "What does the global statement do?",
    "Which exceptions does the text mention?",
    "How are names resolved in class blocks?",
    "What are free variables?",
)
"""About the first document, which their prompts share."""
ANSWER_TOKENS = 48

Asked = tuple[str, tuple[str, ...]]
"""A topic, and all that has been asked about it in one conversation."""
Answers = dict[Asked, str]


def messages(asked: Asked, answers: Mapping[Asked, str]) -> list[dict[str, str]]:
    """The conversation up to its last question; `answers` has those to the questions before."""
    topic, questions = asked
    found = []
    for number, question in enumerate(questions):
        text = question if number else f"{topics[topic]}\n\n{question}"
        found.append({"role": "user", "content": text})
        if number + 1 < len(questions):
            earlier = answers[topic, questions[: number + 1]]
            found.append({"role": "assistant", "content": earlier})
    return found


def run_chats(url: str, probe: Probe, full: Mapping[Asked, str], given: Answers) -> Iterator[Stage]:
    """Send the load to the server at `url`; yields after each part.

    Args:
        full: what full KV answered; what is `given` here, where that is the server.
        given: filled with the answers.
    """
    client = connect(url)

    def ask(asked: Asked) -> None:
        given[asked] = chat(client, messages(asked, full), ANSWER_TOKENS)

    def part(conversations: Sequence[Asked]) -> list[bool]:
        together(ask, conversations)
        return []  # nothing that could be right or wrong

    for name, conversations in _PARTS:
        yield measure(name, probe, partial(part, conversations))


def _turn(number: int) -> list[Asked]:
    return [(topic, TURNS[:number]) for topic in TOPICS]


_PARTS: Sequence[tuple[str, list[Asked]]] = (
    ("chat, turn 1", _turn(1)),
    ("chat, turn 2", _turn(2)),
    ("chat, turn 3", _turn(3)),
    ("shared document", [(TOPICS[0], (question,)) for question in QUESTIONS]),
    ("chat, turn 4", _turn(4)),
)
