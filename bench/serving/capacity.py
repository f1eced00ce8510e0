# SPDX-License-Identifier: Apache-2.0
"""Tokens and requests that fit in equal memory: diffxkv against stock SGLang.

More requests than either server can hold are sent at once. Requests running and their tokens are
read from SGLang's own log line of every decode step; tokens held beside that and the parts of the
bytes from `/diffxkv/stats`.

    python -m bench.serving.capacity [--memory-mib 48] [--head-dim 128]
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from statistics import fmean

from bench.serving.common import (
    MIB,
    PAPER,
    WEIGHTS,
    Load,
    Shape,
    Step,
    decode_steps,
    demo_model,
    diffxkv_server,
    equal_memory,
    page_floor,
    retractions,
    stock_server,
    table,
    write_results,
)
from tests.support.harness import Json, Server

POLL_S = 0.5
NEEDED = 2.5
"""What issue 2 asks for, as a multiple of stock."""


class StatsPoller:
    """Polls `/diffxkv/stats` in a thread and keeps the sample with the most tokens held."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peak: Json = {"tokens_held": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> StatsPoller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            stats = self.server.stats()
            if stats["tokens_held"] > self.peak["tokens_held"]:
                self.peak = stats


def summary(steps: list[Step], log: str) -> Json:
    """What a server held: at its peak, and on average while requests waited for memory."""
    full = [step for step in steps if step.queued]
    if not full:
        raise SystemExit("no request ever waited: the load does not exceed this memory")
    return {
        "requests_peak": max(step.running for step in full),
        "requests_mean": fmean(step.running for step in full),
        "tokens_peak": max(step.tokens for step in full),
        "tokens_mean": fmean(step.tokens for step in full),
        "steps_while_queued": len(full),
        "retracted": retractions(log),
    }


def run_stock(model: Path, tokens: int, load: Load, args: list[object]) -> Json:
    with stock_server(model, tokens, *args) as server:
        load.send(server)
        log = server.log_text()
    # Its pool is full of cached prefixes soon, so what it can hold is what it holds.
    return summary(decode_steps(log), log) | {"tokens_held": tokens}


def run_ours(model: Path, config: Json, load: Load, args: list[object]) -> Json:
    with diffxkv_server(model, config, *args) as server:
        with StatsPoller(server) as poller:
            load.send(server)
        log = server.log_text()
    held = {"tokens_held": poller.peak["tokens_held"], "stats": poller.peak}
    return summary(decode_steps(log), log) | held


ROWS = {
    "requests_peak": "requests running, peak",
    "requests_mean": "requests running, mean while others wait",
    "tokens_peak": "tokens of running requests, peak",
    "tokens_mean": "tokens of running requests, mean while others wait",
    "tokens_held": "tokens held, cached prefixes included, peak",
    "retracted": "requests retracted",
    "steps_while_queued": "decode steps counted",
}


def setting(shape: Shape, result: Json) -> str:
    """What was run, in words."""
    requests, prompt, output = result["load"].values()
    return (
        f"{result['memory_bytes'] // MIB} MiB on both sides; bfloat16 demo model "
        f"{result['shape']}, weights: {result['weights']} ({shape.token_bytes} bytes per "
        f"uncompressed token); {requests} distinct requests of about {prompt} random tokens and "
        f"{output} new ones, all at once. diffxkv: `{json.dumps(result['config'])}`. "
        f"Needed: {NEEDED} × stock."
    )


def report(stock: Json, ours: Json) -> str:
    compared = [["", "stock", "diffxkv", "ratio"]]
    for key, title in ROWS.items():
        ratio = ours[key] / stock[key] if key.startswith(("requests_", "tokens_")) else ""
        compared.append([title, stock[key], ours[key], ratio])
    stats = ours["stats"]
    total = stats["bytes_in_use"]
    parts = [["part", "bytes", "share"]]
    parts += [[k, v, f"{v / total:.1%}"] for k, v in stats["bytes"].items()]
    graded = sum(stats["tier_tokens"].values())
    tiers = ", ".join(f"{k} {v / graded:.1%}" for k, v in stats["tier_tokens"].items())
    return "\n\n".join(
        [
            table(compared),
            f"At the peak of tokens held: {stats['tokens_held']} tokens in {total} bytes of "
            f"{stats['bytes_total']} allocated, physical compression "
            f"{stats['physical_compression']:.2f}; {stats['sealed_pages']} sealed and "
            f"{stats['open_pages']} open pages (of {stats['raw_pages']} raw pages); of the sealed "
            f"(token, KV head, layer) entries {tiers}.",
            table(parts),
        ]
    )


def parse() -> argparse.Namespace:
    about = __doc__.splitlines()[0]
    parser = equal_memory(about, "capacity", memory_mib=48, load=Load(36, 1500, 128))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--weights", choices=WEIGHTS, default="random")
    parser.add_argument("--chunk", type=int, default=512, help="--chunked-prefill-size of both")
    return parser.parse_args()


def main() -> None:
    options = parse()
    shape = Shape(head_dim=options.head_dim)
    memory = options.memory_mib * MIB
    load = Load(options.requests, options.prompt, options.output)
    config: Json = {"policy": "diffkv", "memory_bytes": memory} | PAPER | options.config
    args: list[object] = ["--decode-log-interval", 1, "--chunked-prefill-size", options.chunk]
    args += ["--max-running-requests", options.requests]
    with demo_model(shape, weights=options.weights) as model:
        ours = run_ours(model, config, load, args)
        stock = run_stock(model, page_floor(memory // shape.token_bytes), load, args)
    result: Json = {"shape": shape._asdict(), "weights": options.weights, "memory_bytes": memory}
    result |= {"load": load._asdict(), "config": config, "stock": stock, "diffxkv": ours}
    text = f"{setting(shape, result)}\n\n{report(stock, ours)}"
    write_results(options.name, "Capacity in equal memory", result, text)


if __name__ == "__main__":
    main()
