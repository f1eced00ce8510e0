# SPDX-License-Identifier: Apache-2.0
"""Our CPU platform over HTTP: stock SGLang (its own pool and torch_native attention), and hosts
that servers share."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from tests.support.harness import ColdServer, Server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
TEXT = "The quick brown fox jumps over the lazy dog. "


def test_generate_is_greedy_and_repeatable(stock_server: Server) -> None:
    first, second = (stock_server.generate(TEXT, max_new_tokens=48) for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    assert first["meta_info"]["completion_tokens"] == 48
    assert len(set(first["output_ids"])) > 8, "a constant loop would make parity tests vacuous"


def test_batch_gives_the_same_as_one_at_a_time(stock_server: Server) -> None:
    prompts = [TEXT * n + str(n) for n in range(1, 17)]
    batched = [answer["output_ids"] for answer in stock_server.generate_many(prompts)]
    assert batched == [stock_server.generate(prompt)["output_ids"] for prompt in prompts]


def test_prefix_is_shared_in_whole_pages(stock_server: Server) -> None:
    stock_server.flush_cache()
    prompt = "A shared prefix. " * 20  # 340 tokens: five pages of 64 and 20 tokens more
    cold = stock_server.generate(prompt + "one")
    warm = stock_server.generate(prompt + "two")
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] == 320
    assert stock_server.generate(prompt + "one")["output_ids"] == cold["output_ids"]


def test_chat_turns_extend_one_another(stock_server: Server) -> None:
    stock_server.flush_cache()
    messages = [{"role": "user", "content": TEXT * 3}]
    first = stock_server.chat(messages, max_tokens=80, ignore_eos=True)
    messages.append(dict(first["choices"][0]["message"], role="assistant"))
    messages.append({"role": "user", "content": "And then?"})
    prompt = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"
    second = stock_server.generate(prompt)
    assert first["usage"]["completion_tokens"] == 80
    assert second["meta_info"]["cached_tokens"] == 192


def test_json_schema(stock_server: Server) -> None:
    answer = stock_server.chat(
        [{"role": "user", "content": "Who are you?"}],
        max_tokens=64,
        temperature=1.0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        },
    )
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    person = json.loads(choice["message"]["content"])
    assert person["name"] in ("Ann", "Bob")
    assert isinstance(person["old"], bool)


def test_streaming_adds_up_to_the_whole_text(stock_server: Server) -> None:
    events = list(stock_server.stream(TEXT, max_new_tokens=32))
    assert len(events) > 8
    assert events[-1]["text"] == stock_server.generate(TEXT, max_new_tokens=32)["text"]
    texts = [event["text"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_bfloat16_and_single_token_pages(make_model: Callable[..., Path]) -> None:
    model = make_model(head_dim=80, layers=2, dtype="bfloat16")
    options = ("--page-size", 1, "--max-total-tokens", 8192)
    with Server(model, *options, dtype="bfloat16") as server:
        prompt = TEXT * 8
        first, second = (server.generate(prompt) for _ in range(2))
        assert first["output_ids"] == second["output_ids"]
        assert second["meta_info"]["cached_tokens"] == len(prompt) - 1


def test_servers_that_are_told_nothing_leave_memory_to_others(model: Path, tmp_path: Path) -> None:
    """Two that start at once, each with all of the host to itself as far as SGLang knows.

    They find no compiled kernels, and have them before they say that they are ready.
    """
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    servers = [ColdServer(model, "--attention-backend", "diffxkv", env=env) for _ in range(2)]
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        for server in servers:
            stack.callback(server.stop)
        list(pool.map(ColdServer.__enter__, servers))
        for server in servers:
            (told,) = re.findall(
                r"the pool takes ([\d.]+) GiB of the ([\d.]+) GiB that this host has available; "
                "memory_bytes or --mem-fraction-static",
                server.log_text(),
            )
            taken, available = map(float, told)
            assert 0.1 * available < taken < 0.26 * available
            assert server.stats()["bytes_total"] <= (taken + 0.01) * 2**30
        logs = [x.log_text() for x in servers if "diffxkv: compiled C++ kernels" in x.log_text()]
        assert logs and all(x.index(" C++ kernels (") < x.index("ready to roll") for x in logs)
        built = sorted(tmp_path.rglob("*.so"))
        first, second = (server.generate(TEXT * 9)["output_ids"] for server in servers)
        assert len(built) == 6 and sorted(tmp_path.rglob("*.so")) == built
        assert len(first) == 16 and first == second
