# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a CPU with several new tokens of each sequence."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.decode.layer import DecodeLayers
from sglang_diffxkv.kernels.extend import naive as extend_naive
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedTables
from sglang_diffxkv.kernels.score import RawTables
from sglang_diffxkv.kernels.score import naive as score_naive
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from sglang_diffxkv.kernels.step import PageMetadata, StepRequests, cpu, naive
from tests.support.builders import error_norm
from tests.support.decode_layer import KV_HEADS, LAYERS, Case, make_case
from tests.support.layouts import layout_of

PAGES = 60
LENGTHS = (130, 16, 64, 300, 65)
"""With 16 queries all tokens of a sequence are new; new ones lie in one page, or straddle two."""
OUT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Rounding of the output to its dtype."""


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return str(request.param)


def reference(case: Case, index: int, softmax: Softmax) -> AttentionState:
    """As extend does it, on the raw pages as they are; scores are added, too."""
    tables, pages, batch = case.tables, case.pages, len(case.pages.lengths)
    queries = len(pages.rows) // batch
    valid = torch.arange(pages.table.shape[1]) < pages.count[:, None]
    valid &= pages.table < len(tables.raw_slot)
    slots = tables.raw_slot[pages.table.where(valid, 0).long()]
    is_open, is_sealed = valid & (slots >= 0), valid & (slots < 0)
    indptr = [torch.tensor([0, *mask.sum(1).cumsum(0)]).int() for mask in (is_open, is_sealed)]
    places = torch.arange(pages.table.shape[1]).expand_as(is_open)[is_open].int()
    keys, values = tables.keys[index], tables.values[index]
    new = torch.arange(0, len(pages.rows) + 1, queries).int()
    asked = Queries(case.q, new, pages.lengths - queries)
    opened = OpenPages(keys, values, indptr[0], slots[is_open], places)
    part = extend_naive.extend_open(asked, opened, softmax)
    if tables.sealed is not None:
        arena, frames, heads, means, layout = tables.sealed
        of_layer = SealedTables(arena, frames[index], heads[index], layout)
        listed = of_layer.listed(indptr[1], pages.table[is_sealed])
        if layout.rotates:
            rotated = asked._replace(q=rotate(case.q.double()).float())
            sealed = extend_naive.extend_sealed(rotated, listed, softmax)
            sealed = from_sealed(sealed, case.q, means[index], softmax)
        else:
            sealed = extend_naive.extend_sealed(asked, listed, softmax)
        part = merge_states(part, sealed)
    part = add_sinks(part, softmax.sinks)
    if tables.scores is not None:
        first = pages.lengths - queries + 1
        count = (-(-first // PAGE_TOKENS)).int()
        seen = pages._replace(lengths=first, count=count, rows=pages.rows[::queries])
        raw = RawTables(keys, tables.raw_slot, tables.scores[index])
        score_naive.score_decode(case.q[::queries], part.lse[::queries], seen, raw, softmax)
    return part


def check(isa: str, case: Case, softmax: Softmax) -> None:
    """Both layers, in one call each, against the reference."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    layers = DecodeLayers(case.tables)
    layers.begin(case.pages)
    torch.set_num_threads(1)  # the reference is thousands of tiny operations
    try:
        for index in range(LAYERS):
            scores = case.tables.scores
            accum = None if scores is None else scores[index].clone()
            part = layers.attend(index, case.q, case.k, case.v, softmax)
            for raw, new in ((case.tables.keys, case.k), (case.tables.values, case.v)):
                assert torch.equal(raw[index].flatten(0, 1)[case.pages.rows], new)
            gained = None if scores is None else scores[index] - accum
            if scores is not None:
                scores[index].copy_(accum)
            expected = reference(case, index, softmax)
            tolerance = 3e-4 if isa == "avx512" and case.tables.sealed is not None else 1e-5
            assert error_norm(part.out, expected.out) < tolerance + OUT[case.q.dtype]
            assert (part.lse - expected.lse).abs().max() < tolerance
            if scores is not None:
                assert error_norm(gained, scores[index] - accum) < tolerance
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("queries", [2, 5, 16])
@pytest.mark.parametrize(
    ("dim", "group", "dtype", "formats"),
    [
        (64, 3, torch.float32, ("K8V4", "K4V2")),
        (128, 2, torch.bfloat16, ("K8V4", "K4V2")),
        (80, 1, torch.float16, ("raw", "K4V4")),
        (96, 3, torch.float32, ("raw", "K4V4")),
        (48, 5, torch.bfloat16, ("K8V8", "K2V2")),
        (256, 1, torch.float32, ("K8V4", "K4V2")),
    ],
)
def test_layer_of_drafts(
    isa: str,
    dim: int,
    group: int,
    dtype: torch.dtype,
    formats: tuple[str, str],
    queries: int,
) -> None:
    layout = layout_of(*formats, head_dim=dim, kv_heads=KV_HEADS, itemsize=dtype.itemsize)
    case = make_case(layout, group, dtype, lengths=LENGTHS, queries=queries)
    sinks = torch.linspace(-3, 3, KV_HEADS * group) if queries % 2 else None
    check(isa, case, Softmax(1.7 * dim**-0.5, sinks=sinks))


@pytest.mark.parametrize("window_left", [0, 63, 64, 130, 2000])
@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [(64, 4, torch.bfloat16), (256, 1, torch.float32), (80, 3, torch.float16)],
)
def test_window_layer(
    isa: str, dim: int, group: int, dtype: torch.dtype, queries: int, window_left: int
) -> None:
    """Without sealed pages, whose place the table does not name."""
    layout = layout_of(head_dim=dim, kv_heads=KV_HEADS, itemsize=dtype.itemsize)
    case = make_case(
        layout,
        group,
        dtype,
        scores=False,
        lengths=LENGTHS,
        queries=queries,
        window_left=window_left,
    )
    sinks = torch.linspace(-3, 3, KV_HEADS * group) if window_left != 64 else None
    check(isa, case, Softmax(1.7 * dim**-0.5, 0.0, window_left, sinks))


@pytest.mark.parametrize("cap", [50.0, 0.7])
@pytest.mark.parametrize("formats", [("K8V4", "K4V2"), ("raw", "K4V4"), ("raw", "raw")])
@pytest.mark.parametrize("queries", [1, 4])
def test_capped_layer(isa: str, queries: int, formats: tuple[str, str], cap: float) -> None:
    """Keys lack no mean then."""
    layout = layout_of(*formats, head_dim=128, kv_heads=KV_HEADS, itemsize=4)
    case = make_case(layout, 2, torch.float32, lengths=LENGTHS, queries=queries)
    assert case.tables.sealed is not None
    case.tables.sealed.key_means.zero_()
    check(isa, case, Softmax(0.2, cap, sinks=torch.tensor([1.0, -2.0, 0.3, 5.0])))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("queries", [1, 2, 7, 16])
def test_step_records_what_is_known_to_be_accepted(queries: int, window: int) -> None:
    gen = torch.Generator().manual_seed(queries)
    lengths = torch.tensor([16, 64, 64 + queries - 1, 64 + queries, 1000, 129, 40])
    num_real = torch.tensor([len(lengths) - 1], dtype=torch.int32)
    pages = torch.randperm(PAGES, generator=gen) + 1
    req_to_token = torch.full((9, 1088), 10**9, dtype=torch.int32)
    rows = torch.randperm(9, generator=gen)[: len(lengths)]
    raw_slot = torch.full((PAGES + 1,), -1, dtype=torch.int32)
    first = 0
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        mine = pages[first : first + -(-length // PAGE_TOKENS)]
        first += len(mine)
        tokens = mine[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        req_to_token[row, :length] = tokens.flatten()[:length].int()
        last = mine[-3:] if len(mine) > 3 else mine
        raw_slot[last] = last.int() + 5
    ints = [torch.full_like(raw_slot, -77) for _ in range(3)]
    longs = [torch.full((PAGES + 1,), -77) for _ in range(2)]
    counts = torch.rand(PAGES + 6, PAGE_TOKENS, generator=gen)
    unread = torch.zeros(1, dtype=torch.int32)
    metadata = PageMetadata(raw_slot, raw_slot < 0, *ints, *longs, counts, unread)
    recorded = PageMetadata(*(x.clone() for x in metadata))
    requests = StepRequests(req_to_token, rows, lengths, num_real, queries)
    clock = torch.tensor([1 << 33, 77])
    expected = naive.begin_decode(requests, recorded, clock, window)
    actual = cpu.begin_decode(requests, metadata, clock, window)
    used = torch.arange(expected.table.shape[1]) < expected.count[:, None]
    assert torch.equal(actual.table[used], expected.table[used])
    for name in ("lengths", "count", "last_len", "rows"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert len(actual.rows) == len(lengths) * queries
    for name, table in metadata._asdict().items():
        assert torch.equal(table, getattr(recorded, name)), name
    # Page 1 of sequence 2 holds drafts alone, but for N = 1, whose sequence ends with page 0.
    if queries > 1:
        drafts = int(actual.table[2, 1])
        assert recorded.filled[drafts] == 0 and recorded.context[drafts] == 64
        assert torch.equal(metadata.counts[raw_slot[drafts]], counts[raw_slot[drafts]])
