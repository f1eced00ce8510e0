# SPDX-License-Identifier: Apache-2.0
"""The loads of `bench.serving.scale`: each puts the same to every server, one after the other.

A load takes servers by name, in the order of this round, and returns milliseconds by name.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from bench.serving.common import random_prompt
from tests.support.harness import Json, Server

Servers = dict[str, Server]
Samples = dict[str, list[float]]
Prompts = list[list[int]]

PAUSES_S = (1.2, 2.2)
"""An idle scheduler sleeps for a second at a time, and checks its pool in between. Pauses differ by
as much, so that requests come at any moment of that."""
BUSY, BATCH = 4, 8
BUSY_TOKENS = 768
"""More than any load waits for: what is left is aborted."""
SETTLE = 8
"""First tokens of a measured stream that are left out: others are still being prefilled."""


class Load(NamedTuple):
    """One measure; `samples` are those of a round and server."""

    title: str
    samples: int
    run: Callable[[Servers, random.Random, int], Samples]


def lone(servers: Servers, rng: random.Random, samples: int) -> Samples:
    """One-token requests, each sent when the one before has been answered."""
    prompts = short_prompts(rng, samples)
    return {name: _answer_times(server, prompts) for name, server in servers.items()}


def after_idle(servers: Servers, rng: random.Random, samples: int) -> Samples:
    """One-token requests to a server that has had none for one of `PAUSES_S`."""
    found: Samples = {name: [] for name in servers}
    for prompt in short_prompts(rng, samples):
        # For all of them: each then waits for the others' answers too.
        time.sleep(rng.uniform(*PAUSES_S))
        for name, server in servers.items():
            found[name] += _answer_times(server, [prompt])
    return found


def under_load(servers: Servers, rng: random.Random, samples: int) -> Samples:
    """One-token requests, one at a time, while `BUSY` others generate."""
    others, prompts = short_prompts(rng, BUSY), short_prompts(rng, samples)
    found: Samples = {}
    for name, server in servers.items():
        with _busy(server, others):
            _answer_times(server, short_prompts(rng, 2))  # answered once the others run
            found[name] = _answer_times(server, prompts)
    return found


def decode(servers: Servers, rng: random.Random, samples: int) -> Samples:
    """Times between tokens of one of `BATCH` requests that generate together."""
    *others, prompt = short_prompts(rng, BATCH)
    found: Samples = {}
    for name, server in servers.items():
        with _busy(server, others):
            stamps = [
                time.perf_counter()
                for _ in server.stream(prompt, max_new_tokens=SETTLE + samples + 1)
            ]
        steps = zip(stamps[SETTLE:], stamps[SETTLE + 1 :], strict=False)
        found[name] = [1000 * (after - before) for before, after in steps]
    return found


def state(servers: Servers, rng: random.Random, samples: int) -> Samples:
    """What a server says of itself: `/diffxkv/stats` of ours, `/server_info` of stock."""
    paths = {"stock": "/server_info", "diffxkv": "/diffxkv/stats"}
    return {
        name: [_milliseconds(server.get, paths[name]) for _ in range(samples)]
        for name, server in servers.items()
    }


LOADS = {
    "lone": Load("one token, back to back", 40, lone),
    "after_idle": Load("one token, after {} to {} s of idleness".format(*PAUSES_S), 7, after_idle),
    "under_load": Load(f"one token, while {BUSY} others generate", 24, under_load),
    "decode": Load(f"decode step, {BATCH} requests", 120, decode),
    "state": Load("`/server_info` of stock, `/diffxkv/stats` of diffxkv", 16, state),
}


def short_prompts(rng: random.Random, count: int) -> Prompts:
    """Of 32 to 63 tokens: less than a page, so that none is found in the prefix cache."""
    return [random_prompt(rng, rng.randrange(32, 64)) for _ in range(count)]


def _answer_times(server: Server, prompts: Prompts) -> list[float]:
    return [_milliseconds(server.generate, prompt, max_new_tokens=1) for prompt in prompts]


def _milliseconds(call: Callable[..., object], *args: object, **options: object) -> float:
    begin = time.perf_counter()
    call(*args, **options)
    return 1000 * (time.perf_counter() - begin)


@contextmanager
def _busy(server: Server, prompts: Prompts) -> Iterator[None]:
    """Requests that generate as long as the context lasts."""
    sampling = {"max_new_tokens": BUSY_TOKENS, "temperature": 0.0, "ignore_eos": True}
    body: Json = {"input_ids": prompts, "sampling_params": sampling}
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(server.post, "/generate", body)
        time.sleep(0.1)  # they are to be the first in the queue
        yield
        if answers.done():
            raise RuntimeError("the load ended before what was measured under it")
        server.post("/abort_request", {"abort_all": True})
        answers.result()
