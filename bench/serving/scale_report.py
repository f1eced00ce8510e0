# SPDX-License-Identifier: Apache-2.0
"""The page of `bench.serving.scale`: sections, each made of the whole result."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from bench.serving.common import MIB, table
from tests.support.harness import Json


def latency(result: Json) -> str:
    head = ["measure", "pool", "samples", "stock, p50 / p95", "diffxkv, p50 / p95"]
    rows: list[list[object]] = [[*head, "ratio of p50", "ratio of means"]]
    for name, load in result["loads"].items():
        for size, found in result["sizes"].items():
            times = found["milliseconds"][name]
            sides = [f"{times[s]['p50']:.1f} / {times[s]['p95']:.1f}" for s in ("stock", "diffxkv")]
            ratios = [_spread(times["ratios"][key]) for key in ("p50", "mean")]
            rows.append([load["title"], size, times["stock"]["samples"], *sides, *ratios])
    note = (
        "Milliseconds, HTTP included, over all rounds; samples of each server. Ratios are diffxkv "
        "over stock within a round: the median of all rounds, and the least and the most."
    )
    return f"## Latency\n\n{note}\n\n{table(rows)}"


def idleness(result: Json) -> str:
    rows = [["pool", "stock", "diffxkv", "of diffxkv's, the scheduler"]]
    for size, found in result["sizes"].items():
        stock, ours = found["idle_cpu"]["stock"], found["idle_cpu"]["diffxkv"]
        shares = (sum(stock.values()), sum(ours.values()), ours["scheduler"])
        rows.append([size, *(f"{share:.2%}" for share in shares)])
    note = (
        f"CPU of all processes of a server that nobody asks anything, over "
        f"{result['idle_seconds']:g} s, as a share of a core."
    )
    return f"## Idle servers\n\n{note}\n\n{table(rows)}"


def resident(result: Json) -> str:
    head = ["pool", "server", "start, s", "RSS at start", "at the end"]
    rows: list[list[object]] = [[*head, "PSS at start", "at the end"]]
    for size, found in result["sizes"].items():
        for side in ("stock", "diffxkv"):
            ends = [found["memory_at_start"][side], found["memory_at_end"][side]]
            cells = [f"{end[kind] / MIB:.0f}" for kind in ("rss", "pss") for end in ends]
            rows.append([size, side, f"{found['start_seconds'][side]:.0f}", *cells])
    note = "MiB of memory of all processes of a server, and how long it took to answer first."
    return f"## Memory\n\n{note}\n\n{table(rows)}"


SECTIONS: list[Callable[[Json], str]] = [latency, idleness, resident]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
