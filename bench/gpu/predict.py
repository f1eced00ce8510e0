# SPDX-License-Identifier: Apache-2.0
"""What limits a kernel on an H200, predicted from its machine code. Nothing here is measured.

Three floors on the time per head-token of a main loop: the bytes that it reads at the bandwidth of
a plain copy; the instructions that it issues, one per clock in each quarter of a multiprocessor;
and the products that its tensor cores form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.gpu.build import Built
from bench.gpu.report import markdown_table
from bench.gpu.sass import Loop
from bench.gpu.tiles import Tile, tiles_of

BANDWIDTH = 4.3e12
"""Bytes per second of a copy, assumed."""

MULTIPROCESSORS = 132
CLOCKS = (1.755e9, 1.98e9)
"""Hz: sustained and boost."""

ISSUE_PER_CLOCK = 4
TENSOR_FLOPS_PER_CLOCK = 4096
"""Of one multiprocessor, fp16, by the asynchronous products of a warp group."""

SYNCHRONOUS_SHARE = 0.62
"""What products of single warps reach of that, assumed."""


LATENCY = 800e-9
"""Seconds from a load to its data when memory is busy, assumed."""


class Prediction(NamedTuple):
    """Of one main loop.

    Attributes:
        per_element: thread instructions per element of keys and values.
        loads: bytes that are asked for, divided by those of the payload.
        bytes, issue, tensor: floors in picoseconds per head-token, of the whole GPU, at the lower
            clock.
        limit: the name of the highest.
        share: of the bandwidth that is reached if nothing but the floors counts; at both clocks.
    """

    per_element: float
    loads: float
    bytes: float
    issue: float
    tensor: float
    limit: str
    share: tuple[float, float]


def predict(tile: Tile, loop: Loop, num_warps: int) -> Prediction:
    """Floors of ``loop``, whose iterations do ``tile`` with all warps of a block."""
    warps = num_warps * tile.iterations
    issued = loop.instructions * warps
    synchronous = "HGMMA" not in loop.mix
    flops = loop.tensor_flops * warps / (SYNCHRONOUS_SHARE if synchronous else 1)

    def floors(clock: float) -> dict[str, float]:
        """Picoseconds per head-token."""
        scale = 1e12 / tile.tokens
        return {
            "bytes": tile.bytes / BANDWIDTH * scale,
            "issue": issued / (ISSUE_PER_CLOCK * MULTIPROCESSORS * clock) * scale,
            "tensor": flops / (TENSOR_FLOPS_PER_CLOCK * MULTIPROCESSORS * clock) * scale,
        }

    low, high = (floors(clock) for clock in CLOCKS)
    return Prediction(
        per_element=issued * 32 / tile.elements,
        loads=loop.load_bytes * warps / tile.bytes,
        **low,
        limit=max(low, key=lambda name: low[name]),
        share=(low["bytes"] / max(low.values()), high["bytes"] / max(high.values())),
    )


INTRODUCTION = f"""# Predicted from compiled code, never measured

Floors on an H200 ({MULTIPROCESSORS} multiprocessors, {CLOCKS[0] / 1e9} to {CLOCKS[1] / 1e9} GHz,
{BANDWIDTH / 1e12} TB/s as a copy), from the sm_90 machine code of `make compile-kernels`. Per
head-token, one token of one KV head, in picoseconds of the whole GPU at the lower clock:
**bytes** that must be read or written (once, whatever caches do), instructions to **issue** at four
per clock and multiprocessor, and **products** on tensor cores ({SYNCHRONOUS_SHARE:.0%} of their
peak unless asynchronous). The highest of the three limits; "bandwidth" is the share of the copy's
that is left then, at both clocks. No latency, no barrier and no cache is in it: kernels will be
slower.

"Per element" counts thread instructions of the main loop, of all its branches, per key or value
element. A tile of extend meets a block of query rows; one of score all sampled queries. "Loads" is
what the loop asks memory for, over the payload: the rest is addresses, queries, or padding of
head_dim that is masked. Where a kernel has no loop, it is taken whole. Bytes of pack are those of
an all-high page. "In flight" is the payload of one tile of every thread block that fits on a
multiprocessor, in kB. To reach the bandwidth, {BANDWIDTH / MULTIPROCESSORS * LATENCY / 1e3:.0f} kB
must be under way at any time, if a load takes {LATENCY * 1e9:.0f} ns, which is assumed.

"""

COLUMNS = (
    "kernel", "for", "tokens", "warps", "tile", "instructions", "per element", "loads", "bytes",
    "issue", "products", "limit", "bandwidth", "in flight",
)  # fmt: skip


def parts(built: Built) -> Iterator[tuple[Tile, Loop]]:
    """The tiles of a kernel and the loops that do them, which lie in the same order."""
    tiles, code = tiles_of(built), built.code
    if code is None or not tiles:
        return
    loops = code.main_loops if any(x.tensor for x in code.main_loops) else [code.whole]
    if len(loops) == len(tiles):
        yield from zip(tiles, loops, strict=True)


def rows(results: Iterable[Built]) -> Iterator[list[Any]]:
    """Rows of `COLUMNS`."""
    for built in results:
        blocks = built.occupancy.blocks if built.occupancy else 0
        for tile, loop in parts(built):
            p = predict(tile, loop, built.num_warps)
            yield [
                built.kernel, built.cases[0], tile.name, built.num_warps, tile.tokens,
                loop.instructions, f"{p.per_element:.1f}", f"{p.loads:.2f}", f"{p.bytes:.0f}",
                f"{p.issue:.0f}", f"{p.tensor:.0f}", p.limit,
                f"{p.share[0]:.0%} – {p.share[1]:.0%}", round(blocks * tile.bytes / 1e3),
            ]  # fmt: skip


def report(results: Sequence[Built]) -> str:
    """The page of predictions, of the results for sm_90."""
    hopper = [r for r in results if r.arch == "sm_90"]
    return INTRODUCTION + markdown_table(COLUMNS, dict.fromkeys(map(tuple, rows(hopper))))
