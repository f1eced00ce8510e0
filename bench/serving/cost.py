# SPDX-License-Identifier: Apache-2.0
"""What scoring, solving and sealing cost, in shares of prefill and of decode.

Servers that differ in the policy only are up all the time and answer the same requests in turn, so
that whatever else the machine does hits all; the idle ones sleep. *off*: nothing is scored, graded
or sealed. *pack*: pages are sealed, in one format, without scores. *diffxkv*: everything.

    python -m bench.serving.cost [--rounds 7]
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import ExitStack
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.serving.common import MIB, diffxkv_server, random_prompt, table, write_results
from tests.support.demo_model import write_demo_model
from tests.support.harness import Json, Server

SHAPE = {"layers": 8, "heads": 16, "kv_heads": 4, "head_dim": 64, "hidden": 1024}
MEMORY = {"memory_bytes": 128 * MIB, "raw_share": 0.5}
EVER = 2**20
"""A window that no sequence leaves, so that no page is sealed."""
CONFIGS: dict[str, Json] = {
    "off": {"policy": "streaming", "window": EVER},
    "pack": {"policy": "uniform"},
    "diffxkv": {"policy": "diffxkv"},
}


class Phase(NamedTuple):
    """One request: which part of it dominates."""

    name: str
    prompt: int
    output: int


PHASES = [Phase("prefill", 2048, 2), Phase("decode", 64, 384)]


def seconds(server: Server, prompt: list[int], output: int) -> float:
    server.flush_cache()
    begin = time.perf_counter()
    server.generate(prompt, max_new_tokens=output)
    return time.perf_counter() - begin


def measure(servers: dict[str, Server], phase: Phase, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by configuration; the first round only warms up."""
    rng = random.Random(phase.name)
    found: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        prompt = random_prompt(rng, phase.prompt)
        for name, server in servers.items():
            taken = seconds(server, prompt, phase.output)
            if number:
                found[name].append(taken)
    return found


def report(found: dict[str, dict[str, list[float]]], sealed: dict[str, int]) -> str:
    rows: list[list[object]] = [
        ["phase", "against *off*", "cost, median", "least–most", "seconds, off"]
    ]
    for phase in PHASES:
        times = found[phase.name]
        for name in CONFIGS:
            if name == "off":
                continue
            pairs = zip(times[name], times["off"], strict=True)
            ratios = sorted(ours / off - 1 for ours, off in pairs)
            ends = f"{ratios[0]:+.1%} – {ratios[-1]:+.1%}"
            what = f"{phase.name} ({phase.prompt} + {phase.output} tokens)"
            cost, off = f"{median(ratios):+.1%}", f"{median(times['off']):.2f}"
            rows.append([what, name, cost, ends, off])
    return "\n\n".join(
        [
            f"Demo model of random weights, bfloat16, {SHAPE}; one thread per server; chunks of "
            "512 tokens. Cost: seconds of a whole request over those of *off* in the same round, "
            "minus 1. Sealed pages are also read faster than raw ones, which is in it.",
            table(rows),
            f"Pages sealed in all rounds: {sealed}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="demo-model-") as folder, ExitStack() as stack:
        model = write_demo_model(folder, dtype="bfloat16", **SHAPE)
        servers = {
            name: stack.enter_context(
                diffxkv_server(model, MEMORY | config, "--chunked-prefill-size", 512)
            )
            for name, config in CONFIGS.items()
        }
        found = {phase.name: measure(servers, phase, options.rounds) for phase in PHASES}
        sealed = {name: server.stats()["counters"]["sealed"] for name, server in servers.items()}
    result: Json = {"shape": SHAPE, "configs": CONFIGS, "seconds": found, "sealed": sealed}
    title = "Cost of scoring, solving and sealing"
    write_results("cost", title, result, report(found, sealed))


if __name__ == "__main__":
    main()
