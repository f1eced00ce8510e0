# SPDX-License-Identifier: Apache-2.0
"""The launches that are shipped: every operation, on meta tensors of real models' shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from bench.gpu.compile.settings import (
    BATCH,
    FRAMES,
    LLAMA_8B,
    OPEN_PAGES,
    PAGES,
    QUERIES,
    SETTINGS,
    Model,
    Setting,
    floats,
    ints,
    setting,
)
from sglang_diffxkv.kernels.arena import copy_frames, return_frames, take_frames
from sglang_diffxkv.kernels.decode import decode_open, decode_sealed
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.decode.work import SequencePages, divide_open, divide_work
from sglang_diffxkv.kernels.extend import extend_open, extend_sealed
from sglang_diffxkv.kernels.extend.scratch import make_scratch
from sglang_diffxkv.kernels.extend.unpacked import extend_unpacked
from sglang_diffxkv.kernels.gpu.launch import Launch, recorded
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import add_sinks, empty_state, merge_states
from sglang_diffxkv.kernels.pack import Grades, RawTokens, copy_rows, pack, unpack
from sglang_diffxkv.kernels.pages import LayerPages, SealedTables
from sglang_diffxkv.kernels.score import RawTables, ScoringQueries, score_decode, score_open
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests, begin_decode
from sglang_diffxkv.kernels.write import NewQKV, write_tokens


def _sequences() -> SequencePages:
    return SequencePages(ints(PAGES), ints(BATCH), ints(BATCH), ints(PAGES), ints(BATCH))


def _decode(s: Setting, queries: int = 1, softmax: Softmax | None = None) -> None:
    layers = 2
    heads = ints(layers, PAGES, s.model.kv_heads, 2)
    work = divide_work(_sequences(), heads, s.layout)
    # Layers after the first have work at other addresses, which may be less aligned.
    for layer in range(layers if s is SETTINGS[0] else 1):
        tables = SealedTables(s.arena(), s.tables()[0], heads[layer], s.layout)
        mine = LayerPages(tables, s.raw_pages(), s.raw_pages(), s.key_mean())
        q = s.queries(BATCH * queries)
        attend(q, q, mine, work.layer(layer), softmax or s.softmax, s.dtype)


def _decode_drafts(s: Setting) -> None:
    """Chains of drafts are verified; more rows than eight new tokens have are more programs'."""
    for queries in (2, 4, 8):
        _decode(s, queries)
    _begin_decode(s, queries=4)
    _score_decode(s, queries=4)


DECODE_SOFTMAXES = {
    setting(Model("Gemma-2-9B", 16, 8, 256)): (1, Softmax(256**-0.5, 50.0, 4095)),
    setting(Model("gpt-oss-20b", 64, 8, 64)): (
        4,
        Softmax(64**-0.5, window_left=127, sinks=floats(64)),
    ),
}
"""New tokens, and of the window layers; other layers have all but the window."""


def _decode_softmax(s: Setting) -> None:
    queries, softmax = DECODE_SOFTMAXES[s]
    everywhere = softmax._replace(window_left=-1)
    _decode(s, queries, everywhere)
    pages, q = LayerPages.of_open(s.raw_pages(), s.raw_pages()), s.queries(BATCH * queries)
    attend(q, q, pages, divide_open(_sequences(), pages.tables.layout), softmax, s.dtype)
    if softmax.cap:
        _score_decode(s, softmax=everywhere)


def _decode_parts(s: Setting) -> None:
    """The parts alone, which the same kernels compute; one setting stands for all."""
    if s is not SETTINGS[0]:
        return
    q = s.queries(BATCH)
    decode_sealed(q, s.sealed_pages(BATCH, PAGES), s.softmax)
    decode_open(q, s.opened(), ints(BATCH), s.softmax)


def _extend_sealed(s: Setting) -> None:
    extend_sealed(s.new_tokens(QUERIES, BATCH), s.sealed_pages(BATCH, PAGES), s.softmax)
    # Few queries, whose pages are split.
    extend_sealed(s.new_tokens(16, 1), s.sealed_pages(1, PAGES), s.softmax)


def _extend_unpacked(s: Setting) -> None:
    scratch = make_scratch(s.layout, s.dtype, "meta")
    # Sealed keys that are rotated meet queries that were, in fp32.
    dtype = torch.float32 if s.layout.rotates else s.dtype
    for tokens, batch in ((QUERIES, BATCH), (64, 1)):  # few, whose tokens are split
        queries = s.new_tokens(tokens, batch)
        queries = queries._replace(q=queries.q.to(dtype))
        sealed = s.sealed_pages(batch, scratch.pages)
        extend_unpacked(empty_state(queries.q), queries, sealed, s.softmax, scratch)


def _extend_open(s: Setting) -> None:
    extend_open(s.new_tokens(QUERIES, BATCH), s.opened(), s.softmax)


def _score_open(s: Setting) -> None:
    lse = floats(QUERIES, s.model.heads)
    queries = ScoringQueries(s.queries(QUERIES), lse, ints(BATCH + 1), ints(QUERIES))
    score_open(queries, s.opened(), s.accumulated(), s.softmax)


def _score_decode(s: Setting, queries: int = 1, softmax: Softmax | None = None) -> None:
    tokens = BATCH * queries
    q, lse = s.queries(tokens), floats(tokens, s.model.heads)
    table, rows = ints(BATCH, PAGES // BATCH), torch.empty(tokens, dtype=torch.int64, device="meta")
    pages = StepPages(table, ints(BATCH), ints(BATCH), ints(BATCH), rows)
    raw = RawTables(s.raw_pages(), ints(PAGES), s.accumulated())
    score_decode(q, lse, pages, raw, softmax or s.softmax)


def _pack(s: Setting) -> None:
    raw, tiers = RawTokens(s.raw_pages(), s.raw_pages(), ints(PAGES)), s.tiers()
    pack(raw, Grades(tiers, tiers), s.sealed())


def _unpack(s: Setting) -> None:
    """As `pool.demotion` reads pages."""
    dtype = torch.float32 if s.layout.rotates else s.dtype
    unpack(s.sealed(), ints(PAGES), dtype, s.dtype)


def _copy_rows(s: Setting) -> None:
    copy_rows(s.sealed(), s.tiers(), s.sealed(), s.tiers())


def _take_frames(s: Setting) -> None:
    take_frames(ints(FRAMES), ints(1), ints(PAGES), s.layout.max_frames)


def _return_frames(s: Setting) -> None:
    return_frames(ints(FRAMES), ints(1), ints(PAGES, s.layout.max_frames))


def _copy_frames(s: Setting) -> None:
    """To the host or back: of many pages' layers, or of one layer."""
    ids = ints(PAGES, s.layout.max_frames)
    copy_frames(s.arena(), ids, s.arena(), ids)


def _merge(s: Setting) -> None:
    part = empty_state(s.queries(QUERIES))
    merge_states(part, part)


def _begin_decode(s: Setting, queries: int = 1) -> None:
    def longs(n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.int64, device="meta")

    counts = torch.empty(OPEN_PAGES, PAGE_TOKENS, device="meta")
    sealed = torch.empty(PAGES, dtype=torch.bool, device="meta")
    used = [ints(PAGES) for _ in range(3)] + [longs(PAGES) for _ in range(2)]
    for scores in (counts, None):
        requests = StepRequests(ints(BATCH, 1 << 17), longs(BATCH), longs(BATCH), ints(1), queries)
        metadata = PageMetadata(ints(PAGES), sealed, *used, scores, ints(1))
        begin_decode(requests, metadata, longs(2), PAGE_TOKENS)


def _write_tokens(s: Setting) -> None:
    kv_shape = (BATCH, s.model.kv_heads, s.model.head_dim)
    k, v = s.of_model(*kv_shape), s.of_model(*kv_shape)
    rows = torch.empty(BATCH, dtype=torch.int64, device="meta")
    new = NewQKV(s.queries(BATCH), k, v, rows)
    write_tokens(new, s.raw_pages(), s.raw_pages())


EXTEND_SOFTMAXES = {
    setting(Model("Gemma-2-9B", 16, 8, 256)): Softmax(256**-0.5, 50.0, 4095),
    setting(Model("Gemma-2-27B TP2", 16, 8, 128)): Softmax(144**-0.5, 50.0, 4095),
    setting(Model("gpt-oss-20b", 64, 8, 64)): Softmax(64**-0.5, window_left=127, sinks=floats(64)),
}
"""Of the window layers of models with more than a scale; other layers have all but the window."""


def _extend_softmax(s: Setting) -> None:
    """What the cap, the window and the sinks change; they are in no other case of extend."""
    softmax = EXTEND_SOFTMAXES[s]
    queries = s.new_tokens(QUERIES, BATCH)
    extend_open(queries, s.opened(), softmax)
    if softmax.sinks is not None:
        add_sinks(empty_state(queries.q), softmax.sinks)
    if softmax.cap:
        capped = softmax._replace(window_left=-1)
        extend_sealed(queries, s.sealed_pages(BATCH, PAGES), capped)
        scratch, rotated = make_scratch(s.layout, s.dtype, "meta"), queries.q.float()
        sealed = s.sealed_pages(BATCH, scratch.pages)
        rotated_queries = queries._replace(q=rotated)
        extend_unpacked(empty_state(rotated), rotated_queries, sealed, capped, scratch)
        lse = floats(QUERIES, s.model.heads)
        asking = ScoringQueries(queries.q, lse, ints(BATCH + 1), ints(QUERIES))
        score_open(asking, s.opened(), s.accumulated(), capped)


OPERATIONS: dict[str, Callable[[Setting], None]] = {
    "begin_decode": _begin_decode,
    "write_tokens": _write_tokens,
    "decode": _decode,
    "decode_parts": _decode_parts,
    "decode_drafts": _decode_drafts,
    "decode_softmax": _decode_softmax,
    "merge": _merge,
    "extend_sealed": _extend_sealed,
    "extend_unpacked": _extend_unpacked,
    "extend_open": _extend_open,
    "extend_softmax": _extend_softmax,
    "score_open": _score_open,
    "score_decode": _score_decode,
    "pack": _pack,
    "unpack": _unpack,
    "copy_rows": _copy_rows,
    "take_frames": _take_frames,
    "return_frames": _return_frames,
    "copy_frames": _copy_frames,
}
"""By the name that ``--only`` takes: what is called for every setting of `SETTINGS_OF`."""

SETTINGS_OF: dict[str, Collection[Setting]] = {
    "extend_softmax": EXTEND_SOFTMAXES,
    "decode_drafts": [setting(LLAMA_8B)],
    "decode_softmax": DECODE_SOFTMAXES,
}
"""Those of an operation; of all others they are `SETTINGS`."""


def cases(only: Sequence[str] | None = None) -> Iterator[tuple[str, Launch]]:
    """Name and launch of every kernel that a shipped configuration runs.

    Args:
        only: names of operations; None for all.

    Raises:
        ValueError: there is no such operation.
    """
    if unknown := set(only or ()) - set(OPERATIONS):
        raise ValueError(f"no operation {', '.join(unknown)}; there are {', '.join(OPERATIONS)}")
    for name in only or OPERATIONS:
        for case in SETTINGS_OF.get(name, SETTINGS):
            with recorded() as launches:
                OPERATIONS[name](case)
            for launch in launches:
                yield f"{name} {case.name}", launch
