# SPDX-License-Identifier: Apache-2.0
"""What the processes of a server take: memory, and CPU while nobody asks anything."""

from __future__ import annotations

import time

import psutil

from tests.support.harness import Json, Server


def processes(server: Server) -> dict[str, psutil.Process]:
    """By role, as SGLang titles them (`scheduler`, `detokenizer`); `main` takes the requests."""
    port = server.url.rpartition(":")[2]
    main = next(child for child in psutil.Process().children() if port in child.cmdline())
    found = {"main": main}
    for child in main.children(recursive=True):
        title = child.cmdline()[0].partition("::")[2]
        found[title or f"other-{child.pid}"] = child
    return found


def memory(server: Server) -> Json:
    """Bytes: RSS counts a page once per process that has it, PSS once."""
    full = [process.memory_full_info() for process in processes(server).values()]
    return {"rss": sum(info.rss for info in full), "pss": sum(info.pss for info in full)}


def idle_cpu(servers: dict[str, Server], seconds: float) -> Json:
    """Shares of a core by server and process, over the same `seconds` of idleness."""
    trees = {name: processes(server) for name, server in servers.items()}
    before = {name: _cpu_seconds(tree) for name, tree in trees.items()}
    begin = time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - begin
    shares: Json = {}
    for name, tree in trees.items():
        after = _cpu_seconds(tree)
        shares[name] = {role: (after[role] - before[name][role]) / passed for role in tree}
    return shares


def _cpu_seconds(tree: dict[str, psutil.Process]) -> dict[str, float]:
    times = {role: process.cpu_times() for role, process in tree.items()}
    return {role: spent.user + spent.system for role, spent in times.items()}
