# SPDX-License-Identifier: Apache-2.0
"""What a server costs as its pool grows, beside stock SGLang with a pool of as many bytes.

For each size both servers are up at once, asleep unless they are asked, and every round puts the
same load to one and then to the other, in alternating order: whatever else the machine does hits
both. Everything is seen from outside, over HTTP and in the process table.

    python -m bench.serving.scale [--sizes 24MiB,2GiB,8GiB] [--rounds 5]
    python -m bench.serving.scale --quick --name scale_quick    # to try it
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, median, quantiles

import psutil
from pydantic import ByteSize, TypeAdapter

from bench.serving.common import (
    PAGE_TOKENS,
    command_line,
    diffxkv_server,
    page_floor,
    stock_server,
    write_results,
)
from bench.serving.scale_load import LOADS, Load, Servers, lone
from bench.serving.scale_process import idle_cpu, memory
from bench.serving.scale_report import SECTIONS
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.model import load_model
from tests.support.harness import Json

SPARE_BYTES = 13 * 2**29
"""What two servers and this program take beside the pools: some 2 GiB per server, measured, are
SGLang's own three processes."""


@contextmanager
def pair(size: int) -> Iterator[Servers]:
    """Stock and ours, each with a pool of `size` bytes, warmed up."""
    tokens = page_floor(size // load_model(BUNDLED).token_bytes)
    with (
        stock_server(BUNDLED, tokens) as stock,
        diffxkv_server(BUNDLED, {"memory_bytes": size}) as ours,
    ):
        got = stock.server_info()["max_total_num_tokens"]
        if got != tokens:
            raise SystemExit(f"stock took a pool of {got} tokens, not {tokens}")
        servers = {"stock": stock, "diffxkv": ours}
        lone(servers, random.Random("warm-up"), 8)
        yield servers


def measure(servers: Servers, name: str, load: Load, rounds: int) -> list[Json]:
    """Milliseconds of each round, by server."""
    found = []
    for number in range(rounds):
        for server in servers.values():
            server.flush_cache()  # every round finds empty pools
        order = list(servers.items())[:: 1 if number % 2 == 0 else -1]
        found.append(load.run(dict(order), random.Random(f"{name} {number}"), load.samples))
    return found


def summary(rounds: list[Json]) -> Json:
    """Quantiles of all samples by server, and what ours takes over stock, round by round."""
    pooled = {side: [ms for one in rounds for ms in one[side]] for side in ("stock", "diffxkv")}
    ratios: Json = {}
    for name, statistic in (("p50", median), ("mean", fmean)):
        pairs = [(statistic(one["diffxkv"]), statistic(one["stock"])) for one in rounds]
        ratios[name] = [ours / stock for ours, stock in pairs]
    return {side: described(ms) for side, ms in pooled.items()} | {"ratios": ratios}


def described(ms: list[float]) -> Json:
    p95 = quantiles(ms, n=20, method="inclusive")[-1]
    return {"samples": len(ms), "p50": median(ms), "p95": p95, "mean": fmean(ms), "max": max(ms)}


def run_size(size: int, loads: dict[str, Load], rounds: int, idle_s: float) -> Json:
    """All measures of one pair of servers."""
    with pair(size) as servers:
        result: Json = {"bytes": size}
        result["start_seconds"] = {name: s.start_seconds for name, s in servers.items()}
        result["memory_at_start"] = {name: memory(s) for name, s in servers.items()}
        result["idle_cpu"] = idle_cpu(servers, idle_s)
        result["milliseconds"] = {
            name: summary(measure(servers, name, load, rounds)) for name, load in loads.items()
        }
        result["memory_at_end"] = {name: memory(s) for name, s in servers.items()}
    return result


def parse_sizes(text: str) -> dict[str, int]:
    """Bytes by name, as in `24MiB,2GiB`."""
    sizes = {name: int(TypeAdapter(ByteSize).validate_python(name)) for name in text.split(",")}
    needed, free = 2 * max(sizes.values()) + SPARE_BYTES, psutil.virtual_memory().available
    if needed > free:
        raise SystemExit(f"the largest needs {needed} bytes of memory for two; {free} are free")
    return sizes


def setting(rounds: int) -> str:
    """What was run, in words."""
    return (
        f"The embedded model in bfloat16 ({load_model(BUNDLED).token_bytes} bytes per uncompressed "
        f"token), page size {PAGE_TOKENS}, one thread per server, asleep when idle. Stock: "
        f"`torch_native` attention, as many tokens as the size holds. diffxkv: defaults. Prompts "
        f"of 32 to 63 random tokens, all distinct, the same for both. Both servers are up at once "
        f"and are asked in turn, in {rounds} rounds, each of which finds empty pools."
    )


def parse() -> argparse.Namespace:
    made = command_line(__doc__, "scale")
    made.add_argument("--sizes", type=parse_sizes, default="24MiB,2GiB,8GiB")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--idle-seconds", type=float, default=20)
    made.add_argument("--quick", action="store_true", help="two rounds of a third each")
    return made.parse_args()


def main() -> None:
    options = parse()
    loads, rounds, idle_s = LOADS, options.rounds, options.idle_seconds
    if options.quick:
        loads = {name: load._replace(samples=load.samples // 3) for name, load in LOADS.items()}
        rounds, idle_s = 2, 5
    result: Json = {"rounds": rounds, "idle_seconds": idle_s}
    result["loads"] = {n: {"title": x.title, "samples": x.samples} for n, x in loads.items()}
    result["sizes"] = {}
    for name, size in options.sizes.items():
        print(f"{name}: measuring", flush=True)
        result["sizes"][name] = run_size(size, loads, rounds, idle_s)
    text = "\n\n".join([setting(rounds), *(section(result) for section in SECTIONS)])
    write_results(options.name, "What a server costs as its pool grows", result, text)


if __name__ == "__main__":
    main()
