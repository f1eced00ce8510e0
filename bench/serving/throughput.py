# SPDX-License-Identifier: Apache-2.0
"""Output tokens per second of whole servers in equal memory: diffxkv against stock SGLang.

Both servers are up all the time and answer the same load in turn, so that whatever else the machine
does hits both; the idle one sleeps. Each round starts with an empty cache.

    python -m bench.serving.throughput [--memory-mib 24]    # memory is the limit
    python -m bench.serving.throughput --memory-mib 256 --name throughput_ample
"""

from __future__ import annotations

import json
import time
from statistics import fmean
from typing import NamedTuple

from bench.serving.common import (
    MIB,
    PAPER,
    WEIGHTS,
    Load,
    Shape,
    decode_steps,
    demo_model,
    diffxkv_server,
    equal_memory,
    page_floor,
    stock_server,
    table,
    write_results,
)
from tests.support.harness import Json, Server

CHUNK = 512


class Round(NamedTuple):
    """One server's answer to the whole load."""

    seconds: float
    output_tokens: int
    mean_running: float

    @property
    def rate(self) -> float:
        return self.output_tokens / self.seconds


def run_round(server: Server, load: Load) -> Round:
    server.flush_cache()
    seen = len(decode_steps(server.log_text()))
    begin = time.perf_counter()
    answers = load.send(server)
    seconds = time.perf_counter() - begin
    steps = decode_steps(server.log_text())[seen:]
    tokens = sum(len(answer["output_ids"]) for answer in answers)
    return Round(seconds, tokens, fmean(step.running for step in steps))


def report(result: Json, rounds: list[tuple[Round, Round]]) -> str:
    rows = [["round", "stock, tokens/s", "diffxkv, tokens/s", "ratio", "running, mean"]]
    for i, (stock, ours) in enumerate(rounds):
        running = f"{stock.mean_running:.1f} / {ours.mean_running:.1f}"
        rows.append([i + 1, stock.rate, ours.rate, ours.rate / stock.rate, running])
    load = result["load"]
    return "\n\n".join(
        [
            f"{result['memory_bytes'] // MIB} MiB on both sides; bfloat16 demo model "
            f"{result['shape']}, weights: {result['weights']}; {load['requests']} distinct "
            f"requests of about {load['prompt']} random tokens and {load['output']} new ones, all "
            f"at once. diffxkv: `{json.dumps(result['config'])}`. Output tokens over "
            "the time from the first request to the last answer, prefill included; one "
            "thread per server. Stock's attention is `torch_native`, the only one that it has for "
            "such CPUs, so the ratio holds both more requests at once and a faster kernel.",
            table(rows),
        ]
    )


def main() -> None:
    about = __doc__.splitlines()[0]
    parser = equal_memory(about, "throughput", memory_mib=24, load=Load(24, 900, 100))
    parser.add_argument("--weights", choices=WEIGHTS, default="heavy-hitters")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    shape, memory = Shape(), options.memory_mib * MIB
    config: Json = {"policy": "diffkv", "memory_bytes": memory} | PAPER | options.config
    args = ["--decode-log-interval", 1, "--chunked-prefill-size", CHUNK]
    args += ["--max-running-requests", options.requests]
    load = Load(options.requests, options.prompt, options.output)
    tokens = page_floor(memory // shape.token_bytes)
    with (
        demo_model(shape, weights=options.weights) as model,
        stock_server(model, tokens, *args) as stock,
        diffxkv_server(model, config, *args) as ours,
    ):
        rounds = [(run_round(stock, load), run_round(ours, load)) for _ in range(options.rounds)]
    result: Json = {"shape": shape._asdict(), "weights": options.weights, "memory_bytes": memory}
    result |= {"config": config, "load": load._asdict()}
    result["rounds"] = [{"stock": a._asdict(), "diffxkv": b._asdict()} for a, b in rounds]
    title = "Output throughput of whole servers in equal memory"
    write_results(options.name, title, result, report(result, rounds))


if __name__ == "__main__":
    main()
