# SPDX-License-Identifier: Apache-2.0
"""Prefix-hit tokens of chats and of shared prefixes: diffxkv against stock SGLang.

At equal capacity in tokens the two must hit equally often: sealing is invisible to the radix tree.
In equal memory diffxkv must hit more often: it keeps more tokens. Requests go one after the other,
so that a run is deterministic; each workload starts with an empty cache.

    python -m bench.serving.sharing [--memory-mib 16] [--capacity 8192]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from bench.serving.common import (
    MIB,
    PAGE_TOKENS,
    PAPER,
    Shape,
    demo_model,
    diffxkv_server,
    page_floor,
    random_prompt,
    stock_server,
    table,
    write_results,
)
from tests.support.harness import Json, Server

CHATS, TURNS, USER, ANSWER = 16, 5, 160, 24
PREFIXES, PREFIX, ASKED, QUESTION = 16, 640, 80, 48
CHUNK = 512


class Hits(NamedTuple):
    """Tokens of all prompts of a workload, and how many of them came from the cache."""

    requests: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class Client:
    """Sends one request at a time and sums up what was cached."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.hits = Hits(0, 0, 0)

    def ask(self, prompt: list[int], new_tokens: int) -> list[int]:
        answer = self.server.generate(prompt, max_new_tokens=new_tokens)
        cached = answer["meta_info"]["cached_tokens"]
        n, tokens, before = self.hits
        self.hits = Hits(n + 1, tokens + len(prompt), before + cached)
        return answer["output_ids"]


def chats(client: Client) -> None:
    """`CHATS` conversations of `TURNS` turns, each resuming at a random time."""
    rng = random.Random(1)
    histories = [random_prompt(rng, USER) for _ in range(CHATS)]
    for chat in rng.sample(range(CHATS), counts=[TURNS] * CHATS, k=CHATS * TURNS):
        histories[chat] += client.ask(histories[chat], ANSWER)
        histories[chat] += random_prompt(rng, USER)


def shared_prefixes(client: Client) -> None:
    """`ASKED` questions, each after one of `PREFIXES` long prefixes chosen at random."""
    rng = random.Random(2)
    prefixes = [random_prompt(rng, PREFIX) for _ in range(PREFIXES)]
    for _ in range(ASKED):
        client.ask(rng.choice(prefixes) + random_prompt(rng, QUESTION), 4)


WORKLOADS: dict[str, Callable[[Client], None]] = {
    "chats": chats,
    "shared prefixes": shared_prefixes,
}


def measure(server: AbstractContextManager[Server]) -> dict[str, Hits]:
    found = {}
    with server as running:
        for name, workload in WORKLOADS.items():
            running.flush_cache()
            client = Client(running)
            workload(client)
            found[name] = client.hits
    return found


def compare(model: Path, shape: Shape, memory: int, capacity: int) -> Json:
    """Hits of both servers in both settings: setting -> side -> workload -> Hits."""
    args = ["--chunked-prefill-size", CHUNK]
    # With a byte for each byte of stock's, page ids run out before bytes do: equal capacity.
    ample = {"policy": "diffkv", "memory_bytes": capacity * shape.token_bytes * 2} | PAPER
    limited = {"policy": "diffkv", "memory_bytes": memory} | PAPER
    return {
        "equal capacity": {
            "stock": measure(stock_server(model, capacity, *args)),
            "diffxkv": measure(diffxkv_server(model, ample, "--max-total-tokens", capacity, *args)),
        },
        "equal memory": {
            "stock": measure(stock_server(model, page_floor(memory // shape.token_bytes), *args)),
            "diffxkv": measure(diffxkv_server(model, limited, *args)),
        },
    }


def report(shape: Shape, memory: int, capacity: int, found: Json) -> str:
    rows = [["setting", "workload", "prompt tokens", "stock", "diffxkv", "ratio", "hit rates"]]
    for setting, sides in found.items():
        for workload in WORKLOADS:
            a, b = sides["stock"][workload], sides["diffxkv"][workload]
            ratio = b.cached_tokens / max(1, a.cached_tokens)
            rates = f"{a.rate:.1%} / {b.rate:.1%}"
            tokens = [a.prompt_tokens, a.cached_tokens, b.cached_tokens]
            rows.append([setting, workload, *tokens, ratio, rates])
    stock_tokens = page_floor(memory // shape.token_bytes)
    return "\n\n".join(
        [
            f"bfloat16 demo model {shape._asdict()} with random weights, page size {PAGE_TOKENS}. "
            f"Prompt tokens found in the prefix cache. Equal capacity: {capacity} tokens on both "
            f"sides; equal memory: {memory // MIB} MiB, which hold {stock_tokens} tokens of "
            f"stock's. Chats: {CHATS} of {TURNS} turns ({USER} tokens from the user, {ANSWER} "
            f"answered), resumed in random order. Shared prefixes: {ASKED} questions of "
            f"{QUESTION} tokens, each after one of {PREFIXES} prefixes of {PREFIX} tokens.",
            table(rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-mib", type=int, default=16)
    parser.add_argument("--capacity", type=int, default=8192, help="tokens")
    options = parser.parse_args()
    shape, memory = Shape(), options.memory_mib * MIB
    with demo_model(shape) as model:
        found = compare(model, shape, memory, options.capacity)
    as_json = {
        setting: {
            side: {name: hits._asdict() for name, hits in workloads.items()}
            for side, workloads in sides.items()
        }
        for setting, sides in found.items()
    }
    result = {"memory_bytes": memory, "capacity": options.capacity, "hits": as_json}
    text = report(shape, memory, options.capacity, found)
    write_results("sharing", "Prefix hits", result, text)


if __name__ == "__main__":
    main()
