# SPDX-License-Identifier: Apache-2.0
"""The demo's conversations, and how answers are compared with those of full KV."""

import pytest

from sglang_diffxkv.cli import main
from sglang_diffxkv.demo import chats
from sglang_diffxkv.demo.agreement import Agreement, compare, side_by_side, summary
from sglang_diffxkv.demo.chats import TOPICS, TURNS, messages

FIRST, SECOND = (TOPICS[0], TURNS[:1]), (TOPICS[0], TURNS[:2])


def test_a_conversation_has_the_document_once_and_the_answers_before() -> None:
    said = messages(SECOND, {FIRST: "Names."})
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[0]["content"].endswith(f"\n\n{TURNS[0]}") and len(said[0]["content"]) > 4000
    assert [message["content"] for message in said[1:]] == ["Names.", TURNS[1]]


def test_conversations_grow_turn_by_turn() -> None:
    """Each is asked once, after all that its history holds has been answered."""
    answered: set[chats.Asked] = set()
    for _, conversations in chats._PARTS:
        for topic, questions in conversations:
            before = {(topic, questions[:n]) for n in range(1, len(questions))}
            assert before <= answered and (topic, questions) not in answered
        answered |= set(conversations)


def test_agreement_counts_answers_and_tokens() -> None:
    full = {FIRST: "Names.", SECOND: "Blocks."}
    given = {FIRST: "Names.", SECOND: "Scopes."}
    rows = [{1: -0.1, 2: -3.0}, {1: -0.5, 2: -1.0}]
    others = [{1: -0.1, 2: -3.0}, {1: -1.0, 2: -0.5}]
    found = compare(full, given, rows, others)
    assert found[:4] == (1, 2, 1, 2) and found.kl > 0
    assert compare(full, full, rows, rows) == Agreement(2, 2, 2, 2, 0.0)
    assert "50.0% of 2" in summary(found)
    assert side_by_side(full, given).count("the same") == 1


def test_what_is_no_model_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cpu", "--model", "nowhere"]) == 1
    err = capsys.readouterr().err
    assert "nowhere: not a check" in err and err.count("\n") == 1
