# SPDX-License-Identifier: Apache-2.0
"""Graded eviction: chats of several turns over memory, demotion on against off in equal memory.

Users tell facts in long messages and ask for them later, in random order, one request at a time on
the embedded trained model, so that a run is deterministic. Each round has other loads, sent to each
setting in turn; `ample` has memory for all of it and shows what the model itself gets right.

    python -m bench.serving.demotion [--memory-mib 12] [--rounds 2]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from bench.serving.common import MIB, diffxkv_server, table, write_results
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.estimate import Estimate, hit_rate
from sglang_diffxkv.eval.questions.score import normalise
from sglang_diffxkv.eval.tasks.base import Scene, hide
from sglang_diffxkv.eval.tasks.recall import ATTRIBUTES, PEOPLE
from sglang_diffxkv.eval.tasks.words import HELD_OUT
from tests.support.harness import Json, Server

LOADS, CHATS, FACTS, TURN_TOKENS = 2, 24, 3, 350
AMPLE = 16
"""Times the memory."""
TURNS = ("tell", "tell", "ask", "tell", "ask", "ask")
EVENTS = ("sealed", "demoted", "frames_demoted", "evicted")
SETTINGS: dict[str, tuple[bool, int]] = {
    "on": (True, 1),
    "off": (False, 1),
    "ample": (False, AMPLE),
}
"""Whether pages are demoted, and how many times the memory there is."""


class Run(NamedTuple):
    """One load on one server."""

    prompt_tokens: int
    cached_tokens: int
    right: list[bool]
    """Of each question, in the order in which they were asked."""
    chats: list[int]
    """Whose question it was."""
    events: dict[str, int]
    stats: Json
    """At the end."""


class Chat:
    """Facts told in turns, and asked for in the order in which they were told."""

    def __init__(self, seed: int, tokenizer: Tokenizer) -> None:
        rng = random.Random(seed)
        self._scene = Scene(rng, HELD_OUT, TURN_TOKENS, 1, lambda text: len(tokenizer.encode(text)))
        self._messages: list[dict[str, str]] = []
        kinds = rng.choices(list(ATTRIBUTES), k=FACTS)
        people = rng.sample(PEOPLE, FACTS)
        facts = [f"{kind} of my {who}" for kind, who in zip(kinds, people, strict=True)]
        self._facts = [
            (fact, rng.choice(ATTRIBUTES[kind])) for fact, kind in zip(facts, kinds, strict=True)
        ]
        self._told = self._asked = 0
        self._turns = iter(TURNS)

    def next_turn(self, server: Server) -> tuple[Json, bool | None]:
        """The API's account of usage, and whether the answer is right, if this was a question."""
        if next(self._turns) == "tell":
            fact, value = self._facts[self._told]
            self._told += 1
            usage, _ = self._say(server, hide(self._scene, [f"The {fact} is {value}."]))
            return usage, None
        fact, value = self._facts[self._asked]
        self._asked += 1
        usage, answer = self._say(server, f"What is the {fact}?")
        return usage, normalise(answer) == value

    def _say(self, server: Server, text: str) -> tuple[Json, str]:
        self._messages.append({"role": "user", "content": text})
        found = server.chat(self._messages, max_tokens=32)
        answer = found["choices"][0]["message"]["content"] or ""
        self._messages.append({"role": "assistant", "content": answer})
        return found["usage"], answer


def measure(server: Server, seed: int) -> Run:
    """One load, from an empty cache."""
    server.flush_cache()
    before = server.stats()["counters"]
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    chats = [Chat(1000 * seed + number, tokenizer) for number in range(CHATS)]
    order = random.Random(seed).sample(
        range(CHATS), counts=[len(TURNS)] * CHATS, k=CHATS * len(TURNS)
    )
    prompt_tokens = cached_tokens = 0
    right, asked = [], []
    for number in order:
        usage, is_right = chats[number].next_turn(server)
        prompt_tokens += usage["prompt_tokens"]
        cached_tokens += (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        if is_right is not None:
            right.append(is_right)
            asked.append(1000 * seed + number)
    stats = server.stats()
    events = {name: stats["counters"][name] - before[name] for name in EVENTS}
    return Run(prompt_tokens, cached_tokens, right, asked, events, stats)


def compare(memory: int, rounds: int) -> dict[str, list[Run]]:
    """Runs by setting, `LOADS` a round; each round starts a server for each setting in turn."""
    found: dict[str, list[Run]] = {name: [] for name in SETTINGS}
    for number in range(rounds):
        for name, (demote, times) in SETTINGS.items():
            config = {"memory_bytes": memory * times, "demote": demote}
            with diffxkv_server(BUNDLED, config, "--enable-cache-report") as server:
                found[name] += [measure(server, LOADS * number + load) for load in range(LOADS)]
    return found


def accuracy(runs: Sequence[Run]) -> Estimate:
    return hit_rate([r for run in runs for r in run.right], [c for run in runs for c in run.chats])


def report(memory: int, found: dict[str, list[Run]]) -> str:
    rows: list[list[object]] = [
        [
            "demotion",
            "prompt tokens",
            "from the cache",
            "hit rate",
            "right",
            "95 % interval",
            "tokens held",
            *EVENTS,
        ]
    ]
    for name, runs in found.items():
        prompt, cached = (
            sum(getattr(r, f"{x}_tokens") for r in runs) for x in ("prompt", "cached")
        )
        right = [r for run in runs for r in run.right]
        share = accuracy(runs)
        events = [sum(run.events[event] for run in runs) for event in EVENTS]
        answers = f"{sum(right)} of {len(right)} ({share.mean:.1%})"
        interval = f"{share.low:.1%} to {share.high:.1%}"
        held = sum(run.stats["tokens_held"] for run in runs) // len(runs)
        hits = [prompt, cached, f"{cached / prompt:.1%}"]
        rows.append([name, *hits, answers, interval, held, *events])
    by_load = [["load", *found]]
    for number, runs in enumerate(zip(*found.values(), strict=True)):
        cells = [f"{run.cached_tokens / run.prompt_tokens:.1%}, {sum(run.right)}" for run in runs]
        by_load.append([str(number), *cells])
    pairs = [
        (on, off)
        for a, b in zip(found["on"], found["off"], strict=True)
        for on, off in zip(a.right, b.right, strict=True)
    ]
    only_on, only_off = pairs.count((True, False)), pairs.count((False, True))
    return "\n\n".join(
        [
            f"The embedded model in bfloat16, policy `diffxkv` as configured by default, "
            f"{memory / MIB:.0f} MiB ({AMPLE} times that in `ample`). A load is {CHATS} chats of "
            f"{len(TURNS)} turns in random order: {FACTS} facts, each told in about {TURN_TOKENS} "
            f"tokens, and {FACTS} questions about them; one request at a time. Right: exact match; "
            f"the interval is over chats.",
            table(rows),
            f"Of the same {len(pairs)} questions, {only_on} were answered right only with "
            f"demotion and {only_off} only without.",
            "Hit rate and right answers by load:",
            table(by_load),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-mib", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    memory = options.memory_mib * MIB
    found = compare(memory, options.rounds)
    result = {
        "memory_bytes": memory,
        "runs": {name: [run._asdict() for run in runs] for name, runs in found.items()},
    }
    write_results("demotion", "Graded eviction", result, report(memory, found))


if __name__ == "__main__":
    main()
