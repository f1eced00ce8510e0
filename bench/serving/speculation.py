# SPDX-License-Identifier: Apache-2.0
"""Output tokens per second with NGRAM speculation on text that repeats itself, and without it.

Both servers are up all the time and answer the same load in turn, so that whatever else the machine
does hits both; the idle one sleeps. A request asks for a text that the server has written before,
as those do who have a file edited or a document quoted: its drafts come from there.

    python -m bench.serving.speculation
"""

from __future__ import annotations

import argparse
import json
import random
import time
from statistics import median
from typing import NamedTuple

from bench.serving.common import (
    MIB,
    Shape,
    demo_model,
    diffxkv_server,
    random_prompt,
    table,
    write_results,
)
from tests.support.harness import Json, Server

WARM_UP = 2
"""Rounds before those that count: a prompt's pages are sealed after the first, and read so then."""


class Round(NamedTuple):
    """One server's answers to all requests."""

    seconds: float
    output_tokens: int
    accepted: float
    """Tokens per verification; 1 without speculation."""

    @property
    def rate(self) -> float:
        return self.output_tokens / self.seconds


def run_round(server: Server, items: list[Json], concurrency: int) -> Round:
    begin = time.perf_counter()
    answers = server.generate_many(items, workers=concurrency)
    seconds = time.perf_counter() - begin
    tokens = sum(len(answer["output_ids"]) for answer in answers)
    steps = [answer["meta_info"].get("spec_verify_ct") for answer in answers]
    accepted = 1.0 if None in steps else tokens / sum(steps)
    return Round(seconds, tokens, accepted)


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(result: Json, rounds: list[tuple[Round, Round]]) -> str:
    rows = [["", "median (least to most)"]]
    plain, drafted = ([pair[side] for pair in rounds] for side in (0, 1))
    rows.append(["without speculation, tokens/s", spread([x.rate for x in plain])])
    rows.append(["with NGRAM, tokens/s", spread([x.rate for x in drafted])])
    ratios = [with_ngram.rate / without.rate for without, with_ngram in rounds]
    rows.append(["ratio", spread(ratios)])
    rows.append(["tokens per verification", spread([x.accepted for x in drafted])])
    about = (
        f"bfloat16 demo model {result['shape']}; {result['requests']} requests of "
        f"{result['prompt']} random tokens and {result['output']} new ones, "
        f"{result['concurrency']} at once, whose answers the server has written before; "
        f"{result['nodes']} tokens a "
        f"verification; diffxkv: `{json.dumps(result['config'])}`. {len(rounds)} rounds, the two "
        "servers in turn; output tokens over the time from the first request to the last answer, "
        "prefill included (its pages are cached); one thread per server."
    )
    return "\n\n".join([about, table(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON beside the defaults")
    parser.add_argument("--name", default="speculation", help="of the files in bench/results")
    options = parser.parse_args()
    shape = Shape()
    config: Json = {"memory_bytes": options.memory_mib * MIB} | options.config
    ngram = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", options.nodes)
    rng = random.Random(0)
    items = [
        {"prompt": random_prompt(rng, options.prompt), "max_new_tokens": options.output}
        for _ in range(options.requests)
    ]
    with (
        demo_model(shape) as model,
        diffxkv_server(model, config) as plain,
        diffxkv_server(model, config, *ngram) as drafted,
    ):
        servers = (plain, drafted)
        for server in servers * WARM_UP:
            run_round(server, items, options.concurrency)
        rounds = []
        for _ in range(options.rounds):
            first, second = (run_round(server, items, options.concurrency) for server in servers)
            rounds.append((first, second))
    result: Json = {"shape": shape._asdict(), "config": config}
    names = ("requests", "concurrency", "prompt", "output", "nodes")
    result |= {name: getattr(options, name) for name in names}
    result["rounds"] = [{"without": a._asdict(), "ngram": b._asdict()} for a, b in rounds]
    title = "Output throughput with NGRAM speculation on text that repeats itself"
    write_results(options.name, title, result, report(result, rounds))


if __name__ == "__main__":
    main()
