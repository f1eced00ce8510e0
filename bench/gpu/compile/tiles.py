# SPDX-License-Identifier: Apache-2.0
"""What one iteration of a kernel's main loops does, from the constants that it is compiled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.gpu.compile.built import Built
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, TOKEN_METADATA_BYTES
from sglang_diffxkv.kernels.score.triton_kernels import QUERIES

ITEMSIZE = {"*fp32": 4, "*bf16": 2, "*fp16": 2}

SCORE_QUERIES = 64
"""Sampled queries of a prefill chunk: the default of ``score_queries``."""


SHARES = {"open": 1.0, "high": 0.25, "low": 0.5}
"""Shares of a page's tokens."""


class Tile(NamedTuple):
    """What some iterations of a main loop, mostly one, do in one thread block.

    Attributes:
        name: which tokens.
        tokens: head-tokens.
        elements: of keys and values, together.
        bytes: of payload read or written.
        iterations: how many.
        per_turn: tiles to an iteration of the loop around, with `SHARES` of tokens kept; 0 where
            that loop does not matter.
    """

    name: str
    tokens: int
    elements: int
    bytes: int
    iterations: int = 1
    per_turn: float = 0


def tiles_of(built: Built) -> list[Tile]:
    """Tiles of a kernel's main loops, in their order; empty where it is not known."""
    made = TILES.get(built.kernel)
    return made(built.constants, built.signature) if made else []


def _tile(name: str, tokens: int, dim: int, token_bytes: int) -> Tile:
    return Tile(name, tokens, 2 * dim * tokens, tokens * token_bytes)


def _tier(tokens: int, dim: int, key_bits: int, value_bits: int, itemsize: int) -> Tile:
    """A tile of one tier; 0 bits are raw."""
    if not key_bits:
        return _tile("raw", tokens, dim, 2 * dim * itemsize)
    token_bytes = dim * (key_bits + value_bits) // 8 + META_BYTES
    return _tile(f"K{key_bits}V{value_bits}", tokens, dim, token_bytes)


def _decode(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    """Open, high and low tokens; tiles of raw ones are half as long."""
    tokens, dim = c["TRAITS.constants.tokens"], c["TRAITS.layout.head_dim"]
    itemsize = ITEMSIZE[signature["raw.k"]]

    def tier(kind: str, key_bits: int, value_bits: int) -> Tile:
        size = tokens if key_bits else max(16, tokens // 2)
        tile = _tier(size, dim, key_bits, value_bits, itemsize)
        return tile._replace(per_turn=c["TRAITS.pages"] * PAGE_TOKENS * SHARES[kind] / size)

    tiles = []
    if signature["work.sequences.raw_slot"] != "constexpr":
        tiles.append(tier("open", 0, 0)._replace(name="open"))
    if "sealed.arena" in signature:
        tiles += [tier(kind, *_bits(c, kind)) for kind in ("high", "low")]
    return tiles


def _bits(c: dict[str, Any], tier: str) -> tuple[int, int]:
    """Of keys and values."""
    return c[f"TRAITS.layout.{tier}.key_bits"], c[f"TRAITS.layout.{tier}.value_bits"]


def _extend_sealed(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    size = c["TRAITS.tile.tokens"], c["TRAITS.shape.dim"]
    itemsize = ITEMSIZE[signature["queries.data"]]
    return [_tier(*size, *_bits(c, tier), itemsize) for tier in ("high", "low")]


def _extend_open(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    return [_raw_rows("open", c, signature["raw.k"])]


def _extend_unpacked(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    """Full tiles, and the last one where that is masked by itself."""
    tile = _raw_rows("rows", c, signature["scratch.k"])
    return [tile, tile._replace(name="last rows")] if c["TRAITS.tile.peel"] else [tile]


def _raw_rows(name: str, c: dict[str, Any], pointer: str) -> Tile:
    dim = c["TRAITS.shape.dim"]
    return _tile(name, c["TRAITS.tile.tokens"], dim, 2 * dim * ITEMSIZE[pointer])


def _pack(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    dim, bits = c["LAYOUT.head_dim"], c["LAYOUT.high.key_bits"] + c["LAYOUT.high.value_bits"]
    raw = 2 * dim * ITEMSIZE[signature["raw.k"]]
    stored = dim * bits // 8 + META_BYTES if bits else raw
    return [_tile("all high", c["TOKENS"], dim, raw + stored + TOKEN_METADATA_BYTES)]


def _score_open(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    """A page, whose keys are read before the loop."""
    turns = c["SHAPE.group"] * SCORE_QUERIES // QUERIES
    return [_score(c, signature, f"{SCORE_QUERIES} queries", turns)]


def _score_decode(c: dict[str, Any], signature: dict[str, str]) -> list[Tile]:
    return [_score(c, signature, "1 query", 1)]


def _score(c: dict[str, Any], signature: dict[str, str], name: str, iterations: int) -> Tile:
    elements = PAGE_TOKENS * c["SHAPE.dim"]
    nbytes = elements * ITEMSIZE[signature["keys.data"]] + PAGE_TOKENS * 2 * ITEMSIZE["*fp32"]
    return Tile(name, PAGE_TOKENS, elements, nbytes, iterations)


TILES: dict[str, Callable[[dict[str, Any], dict[str, str]], list[Tile]]] = {
    "decode.attend_work_tile": _decode,
    "extend.sealed_kernel": _extend_sealed,
    "extend.unpacked_kernel": _extend_unpacked,
    "extend.open_kernel": _extend_open,
    "score.open_kernel": _score_open,
    "score.decode_kernel": _score_decode,
    "pack.pack_kernel": _pack,
}
"""By the name of the kernel."""
