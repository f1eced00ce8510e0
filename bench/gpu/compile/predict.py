# SPDX-License-Identifier: Apache-2.0
"""What limits a kernel on an H200, predicted from its machine code. Nothing here is measured.

Four lower bounds on the time per head-token of a main loop: the bytes that it reads at the
bandwidth of a plain copy; the instructions that it issues, one per clock in each quarter of a
multiprocessor; the products that its tensor cores form; and latency: the critical path of an
iteration (`stalls`), of as many blocks as fit on a multiprocessor, whose warps take turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.gpu.compile.built import Built
from bench.gpu.compile.code import Loop
from bench.gpu.compile.report import folded, markdown_table
from bench.gpu.compile.stalls import BARRIER, LOAD, OTHER, TABLE
from bench.gpu.compile.tiles import Tile, tiles_of

BANDWIDTH = 4.3e12
"""Bytes per second of a copy, assumed."""

MULTIPROCESSORS = 132
CLOCK = 1.755e9
"""Hz, sustained."""

SCHEDULERS = 4
"""Of a multiprocessor, each of which issues one instruction per clock."""

TENSOR_FLOPS_PER_CLOCK = 4096
"""Of one multiprocessor, fp16, by the asynchronous products of a warp group."""

SYNCHRONOUS_SHARE = 0.62
"""What products of single warps reach of that, assumed."""


class Prediction(NamedTuple):
    """Of one main loop.

    Attributes:
        per_element: thread instructions per element of keys and values.
        loads: bytes that are asked for, divided by those of the payload.
        bytes, issue, tensor, latency: picoseconds per head-token, of the whole GPU.
        paged: latency together with that of the loop around, shared out among its tiles.
        tile: microseconds from one tile of a block to its next, by latency.
    """

    per_element: float
    loads: float
    bytes: float
    issue: float
    tensor: float
    latency: float
    paged: float
    tile: float

    @property
    def bounds(self) -> dict[str, float]:
        return {x: getattr(self, x) for x in ("bytes", "issue", "tensor", "latency")}

    @property
    def limit(self) -> str:
        """The name of the highest bound."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def time(self) -> float:
        """The highest bound, in picoseconds per head-token."""
        return max(self.bounds.values())

    @property
    def share(self) -> float:
        """Of the bandwidth."""
        return self.bytes / self.time

    @property
    def share_paged(self) -> float:
        """Of the bandwidth, if the loop around counts."""
        return self.bytes / max(self.time, self.paged)


def turn_cycles(instructions: float, cycles: float, warps: int) -> float:
    """Cycles of one iteration of a warp that shares a scheduler with others.

    Mean value analysis of a closed queue: alone the warp needs ``cycles``, of which it issues for
    ``instructions``; when it wants to issue, it finds as many others waiting for the scheduler as
    there are on average with one warp less.
    """
    waiting, time = 0.0, cycles
    for count in range(1, warps + 1):
        turn = instructions * (1 + waiting)
        time = max(cycles - instructions, 0) + turn
        waiting = count / time * turn
    return time


def predict(
    tile: Tile, loop: Loop, num_warps: int, blocks: int, around: Loop | None = None
) -> Prediction:
    """Bounds of ``loop``, whose iterations do ``tile`` with all warps of a block.

    Args:
        blocks: on a multiprocessor.
        around: the loop that ``loop`` is in.
    """
    warps = num_warps * tile.iterations
    issued = loop.instructions * warps
    flops = loop.tensor_flops * warps / (1 if "HGMMA" in loop.mix else SYNCHRONOUS_SHARE)
    per_token = 1e12 / (MULTIPROCESSORS * tile.tokens)
    per_scheduler = -(-blocks * num_warps // SCHEDULERS)

    def latency(instructions: float, cycles: float) -> float:
        """Of a tile: cycles."""
        return turn_cycles(instructions, cycles, per_scheduler) * tile.iterations

    inner = loop.instructions, loop.stalls.cycles
    paged = inner
    if around is not None and tile.per_turn:
        own = around.instructions - inner[0], around.stalls.cycles - inner[1]
        paged = inner[0] + own[0] / tile.per_turn, inner[1] + max(own[1], 0) / tile.per_turn
    shared_out = per_token / (CLOCK * max(blocks, 1))
    return Prediction(
        per_element=issued * 32 / tile.elements,
        loads=loop.load_bytes * warps / tile.bytes,
        bytes=tile.bytes * 1e12 / (BANDWIDTH * tile.tokens),
        issue=issued / (SCHEDULERS * CLOCK) * per_token,
        tensor=flops / (TENSOR_FLOPS_PER_CLOCK * CLOCK) * per_token,
        latency=latency(*inner) * shared_out,
        paged=latency(*paged) * shared_out,
        tile=latency(*inner) / CLOCK * 1e6,
    )


INTRODUCTION = f"""# Predicted from compiled code, never measured

Bounds on an H200 ({MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9} GHz, {BANDWIDTH / 1e12} TB/s
as a copy), from the sm_90 machine code of `make compile-kernels`. Per head-token, one token of one
KV head, in picoseconds of the whole GPU: **bytes** that must be read or written (once, whatever
caches do); instructions to **issue** at four per clock and multiprocessor; products on **tensor**
cores ({SYNCHRONOUS_SHARE:.0%} of their peak unless asynchronous); and **latency**. The highest of
the four limits; "bandwidth" is the share of the copy's that is left then.

Latency is that of the critical path of one iteration of one warp, followed instruction by
instruction as the machine code schedules it: each holds the warp up for the cycles that it says,
and waits for the scoreboards that it names. What has no fixed time is assumed: a load from global
memory takes {LOAD} cycles ({LOAD / CLOCK * 1e9:.0f} ns: memory is busy), or {TABLE} if it is one of
32 bits (tables, from the L2), whatever else has a scoreboard {OTHER}, a barrier {BARRIER} beyond
its issue. Iterations are followed until prefetches are in step: what a later one waits for costs
less, or nothing. "Exposed" is what is waited for loads, "tile" the time of a whole iteration, when
all the blocks that fit share the issue slots (mean value analysis of a closed queue; no efficiency
is assumed). A block reads one tile in that time. Branches are all taken; asynchronous products and
bulk copies cost their issue only. "With pages" also counts the loop around, which looks up the
pages of the next tiles, if of a page's tokens 25% are high and 50% low.

Against a review's estimates of the decode kernel as it was when the model was made (shares of
bandwidth, K8V4 and K4V2, D = 128, four queries to a KV head): Triton 3.6.0 55–60% and 30–35%, the
model 56% and 32%; 3.8.0 75–85% and 45–50%, the model 66% and 38%; 3.8.0 with two stages at least
90% and 65–75%, the model 99% and 54%. With all loads at {LOAD} cycles, as first written, it was
below all of them (41% and 25%, 57% and 32%, 82% and 44%); that tables come from the L2 was added
after that comparison, and nothing since.

"100%" says that none of these bounds is hit, not that a kernel will get there. If, say, only 65% of
the issue slots were filled, K4V2 of Llama-3.1-8B would be limited by them: at 83% of the bandwidth
(564 instructions a tile) under Triton 3.8.0, at 79% (588) under 3.6.0; K8V4 would still not be.

"Per element" counts thread instructions of the main loop, of all its branches, per key or value
element. A tile of extend meets a block of query rows; one of score all sampled queries. "Loads" is
what the loop asks memory for, over the payload: the rest is addresses, queries, or padding of
head_dim that is masked. Where a kernel has no loop, it is taken whole. Bytes of pack are those of
an all-high page.

"""

COLUMNS = (
    "Triton", "kernel", "for", "tokens", "warps", "blocks", "tile", "instructions", "per element",
    "loads", "exposed", "tile, µs", "bytes", "issue", "tensor", "latency", "limit", "bandwidth",
    "with pages",
)  # fmt: skip


def parts(built: Built) -> Iterator[tuple[Tile, Loop]]:
    """The tiles of a kernel and the loops that do them, which lie in the same order."""
    tiles, code = tiles_of(built), built.code
    if code is None or not tiles:
        return
    loops = code.main_loops if any(x.tensor for x in code.main_loops) else [code.whole]
    if len(loops) == len(tiles):
        yield from zip(tiles, loops, strict=True)


def predictions(built: Built) -> Iterator[tuple[Tile, Loop, Prediction]]:
    """Of every tile of a kernel."""
    blocks = built.occupancy.blocks if built.occupancy else 0
    for tile, loop in parts(built):
        around = built.code.around(loop) if built.code else None
        yield tile, loop, predict(tile, loop, built.num_warps, blocks, around)


def row(built: Built, tile: Tile, loop: Loop, p: Prediction) -> list[Any]:
    """One row of `COLUMNS`, to be folded."""
    return [
        built.triton, built.kernel, built.cases, tile.name, built.num_warps,
        built.occupancy.blocks if built.occupancy else 0, tile.tokens, loop.instructions,
        f"{p.per_element:.1f}", f"{p.loads:.2f}", f"{loop.stalls.exposed / CLOCK * 1e6:.2f}",
        f"{p.tile:.2f}", f"{p.bytes:.0f}", f"{p.issue:.0f}", f"{p.tensor:.0f}", f"{p.latency:.0f}",
        p.limit, f"{p.share:.0%}", f"{p.share_paged:.0%}" if tile.per_turn else "–",
    ]  # fmt: skip


def table(results: Iterable[Built]) -> str:
    """The predictions for what was compiled for sm_90."""
    hopper = [r for r in results if r.arch == "sm_90"]
    lines = (row(r, *found) for r in hopper for found in predictions(r))
    return markdown_table(COLUMNS, folded(lines, 2))


def report(results: Sequence[Built]) -> str:
    """The page of predictions."""
    return INTRODUCTION + table(results)
