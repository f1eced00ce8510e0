# SPDX-License-Identifier: Apache-2.0
"""The router demo as a whole: policies compared, then a replica that dies and returns."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from openai import OpenAIError
from tokenizers import Tokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.router.measure import Return
from sglang_diffxkv.demo.router.outage import kill_and_return
from sglang_diffxkv.demo.router.pictures import draw_policies, draw_return
from sglang_diffxkv.demo.router.process import RouterProcess, require_router
from sglang_diffxkv.demo.router.replicas import (
    MEMORY_BYTES,
    NAMES,
    Servers,
    replicas,
    router_options,
)
from sglang_diffxkv.demo.router.table import Run, summary, table
from sglang_diffxkv.demo.router.workload import Chat, Shape, open_chats, shuffled, speak
from sglang_diffxkv.demo.workload import connect
from sglang_diffxkv.launch import ServerError, default_device

POLICIES = ("round_robin", "cache_aware")
"""A replica is killed behind the router that has the last of them."""


class Findings(NamedTuple):
    runs: dict[str, Run]
    """By policy."""
    back: Return


def run_router_demo(device: str | None, output: Path, shape: Shape | None = None) -> Findings:
    """Run it on `device` (None: cuda where there is one, else cpu), and print what was measured.

    Args:
        output: folder that the pictures are written to.
        shape: how much load; None: what fits the replicas' memory in part.

    Raises:
        ServerError: there is no router, a server did not start, or a request was refused.
    """
    require_router()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # More threads than this gain nothing on matrices as small as this model's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shape = shape or Shape()
    print(
        f"{len(NAMES)} replicas, {MEMORY_BYTES / 2**20:.0f} MiB for KV each; {shape.tenants} "
        f"tenants with {shape.chats} chats each, {shape.at_once} requests at once.\n"
        "Starting the replicas (some 30 s on two cores)",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="diffxkv-demo-router-") as folder:
        try:
            found = _measure(device or default_device(), shape, Path(folder))
        except OpenAIError as error:
            raise ServerError(str(error)) from error
    print(f"\n{table(found.runs, NAMES)}\n\n{summary(found.back)}")
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"router_{name}.png" for name in ("policies", "return")]
    draw_policies({name: run.answers for name, run in found.runs.items()}, NAMES, files[0])
    draw_return(found.back, NAMES, files[1])
    print(f"\nPictures: {', '.join(map(str, files))}")
    return found


def _measure(device: str, shape: Shape, folder: Path) -> Findings:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    runs: dict[str, Run] = {}
    with replicas(device, folder) as servers:
        urls = [server.url for server in servers.values()]
        for load, policy in enumerate(POLICIES, 1):
            for server in servers.values():
                server.flush_cache()
            log = folder / f"{policy}.log"
            with RouterProcess(urls, *router_options(policy), log=log) as router:
                chats = open_chats(load, shape, lambda text: len(tokenizer.encode(text)))
                runs[policy] = _take_turns(policy, router.url, servers, chats, shape)
                if policy == POLICIES[-1]:
                    last = runs[policy].turns[-1]
                    back = kill_and_return(router, servers, chats, last, shape.at_once)
    return Findings(runs, back)


def _take_turns(
    policy: str, url: str, servers: Servers, chats: Sequence[Chat], shape: Shape
) -> Run:
    before = _evicted_tokens(servers)
    turns = []
    for turn in range(shape.turns):
        begin = time.monotonic()
        turns.append(list(speak(connect(url), shuffled(chats, turn), shape.at_once)))
        seconds = time.monotonic() - begin
        print(f"{policy}, turn {turn + 1}: {len(chats)} requests in {seconds:.1f} s", flush=True)
    return Run(turns, _evicted_tokens(servers) - before)


def _evicted_tokens(servers: Servers) -> int:
    probes = [Probe(server.url, 0, None) for server in servers.values()]
    return sum(probe.counters().evicted_tokens for probe in probes)
