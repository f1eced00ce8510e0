# SPDX-License-Identifier: Apache-2.0
"""The programs of `examples/`, as users start them, on the bundled model."""

import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.harness import Server

PAGE = 64
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, server: Server, *args: object) -> Any:
    """What the program's `main` returns, beside what it prints."""
    server.flush_cache()
    program = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    return program["main"](["--url", server.url, *map(str, args)])


def test_branches_read_the_document_from_the_cache(
    workers_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("The heron wants the lamp. " * 120)
    tokens = workers_server.generate(text.read_text(), max_new_tokens=1)["meta_info"]
    document_pages = tokens["prompt_tokens"] // PAGE
    assert document_pages > 9
    review = run("programs", workers_server, "--document", text)
    assert len(review.answers) == 4 and review.verdict in ("clear", "unclear")
    assert len(review.calls) == 4 * 3 + 4
    for call in review.calls:
        assert call["cached_tokens"] >= document_pages * PAGE
        assert call["prompt_tokens"] - call["cached_tokens"] < 400, "a branch computes its own part"
    cached = sum(call["cached_tokens"] for call in review.calls)
    out = capsys.readouterr().out
    assert f"16 generations: {cached} of " in out
    assert f"The pool holds {workers_server.stats()['tokens_held']} tokens" in out
    assert workers_server.stats()["sealed_pages"] >= document_pages


def test_tools_are_called_and_their_results_go_back(
    workers_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = run("chat_with_tools", workers_server)
    messages = chat.messages
    assert messages[0]["role"] == "system"
    assert [m["role"] for m in messages].count("user") == 4
    offered = {"in_stock": "item", "delivery": "country"}
    calls = 0
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", [])):
            calls += 1
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            result = messages[index + 1 + number]
            assert result["role"] == "tool" and result["tool_call_id"] == call["id"]
            answer = json.loads(result["content"])
            assert answer[offered[name]] == arguments[offered[name]]
    assert calls >= 3, "one is required after each question"
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    assert all(messages[index + 1].get("tool_calls") for index in asked[:3])
    assert messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    *chatted, summary = [usage.prompt_tokens_details.cached_tokens or 0 for usage in chat.usage]
    assert chatted[0] == 0 and chatted[-1] >= 2 * PAGE
    assert summary == 0, "lossless requests share nothing with others"
    assert workers_server.stats()["pages_by_quality"]["lossless"] > 0
    assert f"request {len(chat.usage)}: 0 of" in capsys.readouterr().out


def test_cards_follow_the_schema_and_share_the_instruction(
    workers_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_text(f"Page {number}. " + "The heron wants the lamp. " * number)
    found = run("batch_extraction", workers_server, *paths)
    assert len(found) == len(paths)
    for extraction in found:
        schema = type(extraction.card).model_json_schema()
        jsonschema.validate(json.loads(extraction.card.model_dump_json()), schema)
    # The first one's prompt is the instruction, but for a few tokens.
    shared = (found[0].usage.prompt_tokens - 2 * PAGE) // PAGE * PAGE
    assert shared > 4 * PAGE
    cached = [extraction.usage.prompt_tokens_details.cached_tokens for extraction in found[1:]]
    assert min(cached) >= shared
    assert f"{sum(cached)} of " in capsys.readouterr().out
