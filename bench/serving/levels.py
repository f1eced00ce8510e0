# SPDX-License-Identifier: Apache-2.0
"""Chats that return after others have filled the memory: device alone, host and disk behind it.

Servers with device memory M, with 4M of host memory behind it, and with 16M of disk behind that;
stock SGLang with 5M of device memory; one whose memory never runs out, for the answers; and that
one without a prefix cache, for the time that recomputing takes. All are up all the time, asleep
unless asked. Each turn of each chat is put to every one of them, one after the other in rotating
order, so that whatever else the machine does hits all alike. Chats return in random order. In the
end the server with a disk is started again, and every chat returns once more.

    python -m bench.serving.levels
    OMP_NUM_THREADS=2 python -m bench.serving.levels --model SmolLM2-135M --label SmolLM2-135M \
        --dtype float32 --memory-mib 60 --chats 30 --turns 3 --first 900 --answer 8 \
        --name levels_smollm2

A model computes in fp32 where the CPU knows no bf16, which takes five times as long there; stock's
tokens are counted in bf16 all the same, while our raw pages then take twice the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tokenizers import Tokenizer

from bench.serving.common import (
    MIB,
    RESULTS,
    command_line,
    diffxkv_server,
    page_floor,
    stock_server,
    write_results,
)
from bench.serving.levels_report import plot, report
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.documents.corpus import load_documents
from sglang_diffxkv.eval.model import load_model
from tests.support.harness import Json, Server

HOST, DISK, STOCK, AMPLE = 4, 16, 5, 32
"""Times M: of host memory, of disk, of stock's device memory and of memory without pressure."""
SIDES = ("device", "host", "disk", "stock", "ample", "recomputed")
REFERENCE = "ample"
RESTARTED = ("disk", "ample", "recomputed")
"""Sides that answer after the restart of the one with a disk."""
BYTES_BF16 = 2
EXACT: Json = {"window": 0, "learn_share": 0, "demote": False, "target": 4, "raw_share": 0.3}
CHUNK = 64
"""With these a page is sealed by itself, not with as many as there is room to grade or to turn at
once, as soon as it is full and scored, and stays as it is: whether memory is short shows in no
answer, unless tokens are computed again."""
REST_S = 3.0
"""Before a restart: an idle server writes to disk what is not there yet."""


class Workload(NamedTuple):
    """Chats that return in random order; lengths in tokens."""

    chats: int
    turns: int
    first: int
    """Of a chat's first message."""
    user: int
    """Of those that follow."""
    answer: int
    seed: int

    def order(self) -> list[int]:
        """Whose turn it is, for all turns."""
        chats, turns = range(self.chats), self.chats * self.turns
        return random.Random(self.seed).sample(chats, counts=[self.turns] * self.chats, k=turns)

    def messages(self, tokens: list[int]) -> list[Iterator[list[int]]]:
        """Of each chat: messages one after the other in `tokens`, from a place of its own."""
        longest = self.first + self.turns * self.user  # one more turn after the restart
        rng = random.Random(self.seed)
        starts = rng.sample(range(len(tokens) - longest), self.chats)
        return [self._messages(tokens[start:]) for start in starts]

    def _messages(self, tokens: list[int]) -> Iterator[list[int]]:
        at = 0
        for length in chain([self.first], [self.user] * self.turns):
            yield tokens[at : at + length]
            at += length


class Turn(NamedTuple):
    """One answer of one server."""

    chat: int
    turn: int
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float
    loaded: int
    """Pages that came back from host memory."""
    read: int
    """Pages that came from disk."""
    output: list[int]


class Chats:
    """All chats with one server, which hears its own answers again."""

    def __init__(self, server: Server, workload: Workload, *, is_ours: bool) -> None:
        self.server, self._is_ours = server, is_ours
        self.turns: list[Turn] = []
        self._answer = workload.answer
        self._histories: list[list[int]] = [[] for _ in range(workload.chats)]
        self._moved = (0, 0)

    def say(self, chat: int, turn: int, message: list[int]) -> None:
        prompt = self._histories[chat]
        prompt += message
        begin = time.perf_counter()
        events = self.server.stream(prompt, max_new_tokens=self._answer)
        first = next(events)
        ttft = time.perf_counter() - begin
        *_, last = first, *events
        cached = last["meta_info"]["cached_tokens"]
        moved, before = self._pages_moved(), self._moved
        self._moved = moved
        loaded, read = (now - then for now, then in zip(moved, before, strict=True))
        output = last["output_ids"]
        if len(output) != self._answer:
            raise SystemExit(f"no whole answer: {last['meta_info']['finish_reason']}")
        self.turns.append(Turn(chat, turn, len(prompt), cached, ttft * 1e3, loaded, read, output))
        prompt += output

    def moves_to(self, server: Server) -> None:
        """Go on with a server that was started again."""
        self.server, self._moved = server, (0, 0)

    def _pages_moved(self) -> tuple[int, int]:
        stats = self.stats()
        host, disk = stats.get("host"), stats.get("disk")
        return host["loaded_back"] if host else 0, disk["read"] if disk else 0

    def stats(self) -> Json:
        """Of our pool; empty where it is stock's."""
        return self.server.stats() if self._is_ours else {}


class Bench(NamedTuple):
    """What the servers are given."""

    model: Path
    memory: int
    token_bytes: int
    """Of one token's K and V in bf16."""
    config: Json
    disk: Path
    dtype: str

    def server(self, side: str) -> Server:
        if side == "stock":
            tokens = page_floor(STOCK * self.memory // self.token_bytes)
            return stock_server(self.model, tokens, dtype=self.dtype)
        times = AMPLE if side in ("ample", "recomputed") else 1
        own: Json = {"memory_bytes": times * self.memory}
        if side == "device":  # today's way to hold more
            own["demote"] = True
        if side in ("host", "disk"):
            own["host_bytes"] = HOST * self.memory
        if side == "disk":
            own |= {"disk_path": str(self.disk), "disk_bytes": DISK * self.memory}
        # Recomputing is as fast as it can be: a prompt in one chunk.
        chunk = ["--chunked-prefill-size", CHUNK]
        args = ["--disable-radix-cache"] if side == "recomputed" else chunk
        return diffxkv_server(self.model, self.config | own, *args, dtype=self.dtype)


def run(bench: Bench, workload: Workload) -> Json:
    """Turns of all sides, those after the restart, and what the pools held."""
    texts = Tokenizer.from_file(str(bench.model / "tokenizer.json"))
    tokens = [i for document in load_documents(None) for i in texts.encode(document.text).ids]
    messages = workload.messages(tokens)
    with ExitStack() as stack:
        all_chats = {}
        for side in SIDES:
            server = stack.enter_context(bench.server(side))
            all_chats[side] = Chats(server, workload, is_ours=side != "stock")
        turn_of = [0] * workload.chats
        for number, chat in enumerate(workload.order()):
            message = next(messages[chat])
            for shift in range(len(SIDES)):
                side = SIDES[(number + shift) % len(SIDES)]
                all_chats[side].say(chat, turn_of[chat], message)
            turn_of[chat] += 1
            if (number + 1) % workload.chats == 0:
                print(f"{number + 1} of {workload.chats * workload.turns} turns", flush=True)
        turns = {side: chats.turns.copy() for side, chats in all_chats.items()}
        stats = {side: chats.stats() for side, chats in all_chats.items()}
        again = warm_start(bench, workload, all_chats, messages)
    return {"turns": compared(turns), "stats": stats, "restarted": compared(again)}


def warm_start(
    bench: Bench,
    workload: Workload,
    all_chats: dict[str, Chats],
    messages: list[Iterator[list[int]]],
) -> dict[str, list[Turn]]:
    """One more turn of every chat, after the server with a disk was started again."""
    time.sleep(REST_S)
    done = {side: len(all_chats[side].turns) for side in all_chats}
    all_chats["disk"].server.stop()
    with bench.server("disk") as server:
        all_chats["disk"].moves_to(server)
        for chat in random.Random(workload.seed).sample(range(workload.chats), workload.chats):
            message = next(messages[chat])
            for side in RESTARTED:
                all_chats[side].say(chat, workload.turns, message)
    return {side: all_chats[side].turns[done[side] :] for side in RESTARTED}


def compared(turns: dict[str, list[Turn]]) -> dict[str, list[Json]]:
    """Turns with `equal` instead of their answer: whether it is that of the reference."""
    expected = [turn.output for turn in turns[REFERENCE]]
    found: dict[str, list[Json]] = {}
    for side, own in turns.items():
        rows = [turn._asdict() for turn in own]
        for row, output in zip(rows, expected, strict=True):
            row["equal"] = row.pop("output") == output
        found[side] = rows
    return found


def parse() -> argparse.Namespace:
    made = command_line(__doc__ or "", "levels")
    made.add_argument("--model", type=Path, default=BUNDLED)
    made.add_argument("--label", default="embedded model")
    made.add_argument("--dtype", default="bfloat16", help="that the model computes in")
    made.add_argument("--memory-mib", type=float, default=8, help="M")
    made.add_argument("--chats", type=int, default=48)
    made.add_argument("--turns", type=int, default=5)
    made.add_argument("--first", type=int, default=1000)
    made.add_argument("--user", type=int, default=100)
    made.add_argument("--answer", type=int, default=12)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--config", type=json.loads, default=EXACT, help="JSON instead of `EXACT`")
    return made.parse_args()


def main() -> None:
    options = parse()
    names = ("chats", "turns", "first", "user", "answer", "seed")
    workload = Workload(*(getattr(options, name) for name in names))
    shape = load_model(options.model)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES_BF16
    memory = int(options.memory_mib * MIB)
    with TemporaryDirectory(prefix="levels-") as disk:
        bench = Bench(options.model, memory, token_bytes, options.config, Path(disk), options.dtype)
        found = run(bench, workload)
    result: Json = {
        "model": options.label,
        "dtype": options.dtype,
        "memory_bytes": memory,
        "ample": AMPLE,
        "chunk": CHUNK,
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),  # as the harness has it
        "token_bytes": token_bytes,
        "config": options.config,
        "workload": workload._asdict(),
        **found,
    }
    write_results(options.name, "Chats that return, by level", result, report(result))
    plot(RESULTS / f"{options.name}.png", result)


if __name__ == "__main__":
    main()
