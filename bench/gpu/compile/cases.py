# SPDX-License-Identifier: Apache-2.0
"""The launches that are shipped: every operation, on meta tensors of real models' shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.arena import return_frames, take_frames
from sglang_diffxkv.kernels.decode import decode_open, decode_sealed
from sglang_diffxkv.kernels.decode.plan import SequencePages, plan_decode
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.extend import extend_open, extend_sealed, make_scratch
from sglang_diffxkv.kernels.extend.unpacked import extend_unpacked
from sglang_diffxkv.kernels.gpu.launch import Launch, recorded
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, PageLayout, make_layout
from sglang_diffxkv.kernels.merge import empty_state, merge_states
from sglang_diffxkv.kernels.pack import Grades, RawTokens, copy_rows, pack, unpack
from sglang_diffxkv.kernels.pages import OpenPages, SealedTables
from sglang_diffxkv.kernels.score import SampledQueries, score_decode, score_open
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, begin_decode
from sglang_diffxkv.kernels.write import write_tokens

BATCH, PAGES, OPEN_PAGES, QUERIES, FRAMES = 64, 8192, 192, 2048, 65536
"""Sequences; sealed pages listed and in the tables; raw pages; new tokens; frames of the arena."""


class Model(NamedTuple):
    """Attention of one rank."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_8B = Model("Llama-3.1-8B", 32, 8, 128)
MODELS = (
    LLAMA_8B,
    Model("Qwen2.5-7B", 28, 4, 128),
    Model("Llama-3.1-70B TP8", 8, 1, 128),
    Model("Qwen3-235B", 64, 4, 128),
    Model("Qwen2.5-0.5B", 14, 2, 64),
    Model("Phi-2", 32, 32, 80),
    Model("Phi-3-mini", 32, 32, 96),
    Model("Gemma-2-9B", 16, 8, 256),
)
TIERS = ("K8V4", "K4V2")


class Setting(NamedTuple):
    """What an operation is called for; its tensors are on the meta device."""

    model: Model
    layout: PageLayout
    dtype: torch.dtype

    @property
    def name(self) -> str:
        tiers = f"{self.layout.high.name}/{self.layout.low.name}"
        return f"{self.model.name} {tiers} {str(self.dtype).removeprefix('torch.')}"

    @property
    def sm_scale(self) -> float:
        return self.model.head_dim**-0.5

    def of_model(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def queries(self, count: int) -> torch.Tensor:
        return self.of_model(count, self.model.heads, self.model.head_dim)

    def raw_pages(self) -> torch.Tensor:
        return self.of_model(OPEN_PAGES, PAGE_TOKENS, self.model.kv_heads, self.model.head_dim)

    def accumulated(self) -> torch.Tensor:
        return floats(OPEN_PAGES, self.model.kv_heads, PAGE_TOKENS)

    def arena(self) -> torch.Tensor:
        return torch.empty(FRAMES, self.layout.frame_bytes, dtype=torch.uint8, device="meta")

    def key_mean(self) -> torch.Tensor | None:
        shape = self.model.kv_heads, self.model.head_dim
        return torch.empty(shape, device="meta") if self.layout.rotates else None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame table and head records of `PAGES` pages."""
        return ints(PAGES, self.layout.max_frames), ints(PAGES, self.model.kv_heads, 2)

    def sealed(self) -> SealedTables:
        return SealedTables(self.arena(), *self.tables(), self.layout)

    def tiers(self) -> torch.Tensor:
        shape = PAGES, self.model.kv_heads, PAGE_TOKENS
        return torch.empty(shape, dtype=torch.uint8, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def setting(
    model: Model, tiers: tuple[str, str] = TIERS, dtype: torch.dtype = torch.bfloat16
) -> Setting:
    """A model with a pair of tiers."""
    layout = make_layout(
        head_dim=model.head_dim,
        num_kv_heads=model.kv_heads,
        raw_itemsize=dtype.itemsize,
        high=FORMATS[tiers[0]],
        low=FORMATS[tiers[1]],
    )
    return Setting(model, layout, dtype)


SETTINGS = (
    *(setting(model) for model in MODELS),
    setting(LLAMA_8B, ("raw", "K4V2")),
    setting(LLAMA_8B, ("K8V8", "K4V4")),
    setting(LLAMA_8B, dtype=torch.float16),
)


def _decode(s: Setting) -> None:
    layers, pages = 2, ints(PAGES)
    heads = ints(layers, PAGES, s.model.kv_heads, 2)
    sequences = SequencePages(pages, ints(BATCH), ints(BATCH), ints(PAGES), ints(BATCH))
    plan = plan_decode(sequences, heads, s.layout)
    # Layers after the first have plans at other addresses, which may be less aligned.
    for layer in range(layers if s is SETTINGS[0] else 1):
        mine = plan.layer(layer)
        q, raw, frames = s.queries(BATCH), s.raw_pages(), s.tables()[0]
        arguments = (q, q, s.arena(), frames, heads[layer], raw, raw, mine, s.layout, s.sm_scale)
        attend(*arguments, key_mean=s.key_mean(), dtype=s.dtype)


def _decode_parts(s: Setting) -> None:
    """The parts alone, which the same kernels compute; one setting stands for all."""
    if s is not SETTINGS[0]:
        return
    q, indptr, raw = s.queries(BATCH), ints(BATCH + 1), s.raw_pages()
    decode_sealed(q, s.arena(), *s.tables(), indptr, ints(PAGES), s.layout, s.sm_scale)
    decode_open(q, raw, raw, indptr, ints(OPEN_PAGES), ints(BATCH), s.sm_scale)


def _extend_sealed(s: Setting) -> None:
    q, q_indptr, indptr = s.queries(QUERIES), ints(BATCH + 1), ints(BATCH + 1)
    extend_sealed(q, q_indptr, s.arena(), *s.tables(), indptr, ints(PAGES), s.layout, s.sm_scale)
    # Few queries, whose pages are split.
    few = s.queries(16), ints(2), s.arena(), *s.tables(), ints(2), ints(PAGES)
    extend_sealed(*few, s.layout, s.sm_scale)


def _extend_unpacked(s: Setting) -> None:
    scratch = make_scratch(s.layout, s.dtype, "meta")
    # Sealed keys that are rotated meet queries that were, in fp32.
    dtype = torch.float32 if s.layout.rotates else s.dtype
    for queries, batch in ((QUERIES, BATCH), (64, 1)):  # few, whose tokens are split
        q = s.queries(queries).to(dtype)
        lists = ints(batch + 1), ints(scratch.pages)
        where = ints(batch + 1), s.arena(), *s.tables(), *lists
        extend_unpacked(empty_state(q), q, *where, s.layout, s.sm_scale, scratch)


def _extend_open(s: Setting) -> None:
    q, q_indptr, q_position = s.queries(QUERIES), ints(BATCH + 1), ints(BATCH)
    pages = ints(BATCH + 1), ints(OPEN_PAGES), ints(OPEN_PAGES)
    raw = s.raw_pages()
    extend_open(q, q_indptr, q_position, raw, raw, *pages, s.sm_scale)


def _score_open(s: Setting) -> None:
    queries = SampledQueries(s.queries(QUERIES), ints(BATCH + 1), ints(QUERIES))
    lists = ints(BATCH + 1), ints(OPEN_PAGES), ints(OPEN_PAGES)
    opened = OpenPages(s.raw_pages(), s.raw_pages(), *lists)
    score_open(queries, floats(QUERIES, s.model.heads), opened, s.accumulated(), s.sm_scale)


def _score_decode(s: Setting) -> None:
    q, lse = s.queries(BATCH), floats(BATCH, s.model.heads)
    table, rows = ints(BATCH, PAGES // BATCH), torch.empty(BATCH, dtype=torch.int64, device="meta")
    pages = StepPages(table, ints(BATCH), ints(BATCH), ints(BATCH), rows)
    score_decode(q, lse, pages, s.raw_pages(), ints(PAGES), s.accumulated(), s.sm_scale)


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


def _merge(s: Setting) -> None:
    part = empty_state(s.queries(QUERIES))
    merge_states(part, part)


def _begin_decode(s: Setting) -> None:
    def longs(n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.int64, device="meta")

    counts = torch.empty(OPEN_PAGES, PAGE_TOKENS, device="meta")
    directory = [ints(PAGES) for _ in range(4)] + [longs(PAGES) for _ in range(2)]
    for scores in (counts, None):
        batch = ints(BATCH, 1 << 17), longs(BATCH), longs(BATCH), ints(1), longs(2)
        begin_decode(*batch, PageMetadata(*directory, scores), PAGE_TOKENS)


def _write_tokens(s: Setting) -> None:
    kv_shape = (BATCH, s.model.kv_heads, s.model.head_dim)
    k, v = s.of_model(*kv_shape), s.of_model(*kv_shape)
    rows = torch.empty(BATCH, dtype=torch.int64, device="meta")
    write_tokens(s.queries(BATCH), k, v, rows, s.raw_pages(), s.raw_pages())


OPERATIONS: dict[str, Callable[[Setting], None]] = {
    "begin_decode": _begin_decode,
    "write_tokens": _write_tokens,
    "decode": _decode,
    "decode_parts": _decode_parts,
    "merge": _merge,
    "extend_sealed": _extend_sealed,
    "extend_unpacked": _extend_unpacked,
    "extend_open": _extend_open,
    "score_open": _score_open,
    "score_decode": _score_decode,
    "pack": _pack,
    "unpack": _unpack,
    "copy_rows": _copy_rows,
    "take_frames": _take_frames,
    "return_frames": _return_frames,
}
"""By the name that ``--only`` takes: what is called for every setting."""


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
        for case in SETTINGS:
            with recorded() as launches:
                OPERATIONS[name](case)
            for launch in launches:
                yield f"{name} {case.name}", launch
