# SPDX-License-Identifier: Apache-2.0
"""A layer of a decode step in one call, against the float64 references of what it does."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.decode import layer, naive
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pages import OpenPages, SealedTables
from sglang_diffxkv.kernels.score import RawTables
from sglang_diffxkv.kernels.score import naive as score_naive
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.builders import error_norm
from tests.support.decode_layer import KV_HEADS, LAYERS, Case, make_case
from tests.support.layouts import layout_of
from tests.support.pairs import pairs

OUT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Rounding of the output to its dtype; sealed tiers add what `test_decode.py` allows for them."""


def reference(case: Case, index: int, softmax: Softmax) -> AttentionState:
    """The same in float64, on the raw pages as they are; scores are added, too."""
    tables, pages, packed = case.tables, case.pages, case.tables.sealed
    assert packed is not None
    layout = packed.layout
    places = torch.arange(pages.table.shape[1])
    valid = places < pages.count[:, None]
    slots = tables.raw_slot[pages.table.where(valid, 0).long()]
    is_open, is_sealed = valid & (slots >= 0), valid & (slots < 0)
    indptr = [torch.tensor([0, *mask.sum(1).cumsum(0)]).int() for mask in (is_open, is_sealed)]
    keys, values = tables.keys[index], tables.values[index]
    places = places.expand_as(is_open)[is_open].int()
    opened = OpenPages(keys, values, indptr[0], slots[is_open], places)
    part = naive.decode_open(case.q, opened, pages.last_len, softmax)
    q = rotate(case.q.double()).float() if layout.rotates else case.q
    listed = pages.table[is_sealed]
    of_layer = SealedTables(packed.arena, packed.frames[index], packed.heads[index], layout)
    sealed = naive.decode_sealed(q, of_layer.listed(indptr[1], listed), softmax)
    if layout.rotates:
        sealed = from_sealed(sealed, case.q, packed.key_means[index], softmax)
    part = merge_states(part, sealed)
    if tables.scores is not None:
        raw = RawTables(keys, tables.raw_slot, tables.scores[index])
        score_naive.score_decode(case.q, part.lse, pages, raw, softmax)
    return part


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return str(request.param)


SHAPES = [
    (64, 2, torch.float32),
    (128, 4, torch.bfloat16),
    (80, 1, torch.float16),
    (96, 3, torch.float32),
    (48, 5, torch.bfloat16),
    (256, 1, torch.float32),
]
"""head_dim, queries of a KV head, dtype."""
FORMATS = [("K8V4", "K4V2"), ("raw", "K4V4")]


@pytest.mark.parametrize(
    ("shape", "formats", "scores", "threads"), pairs(SHAPES, FORMATS, [True, False], [1, 2])
)
def test_layer(
    isa: str,
    shape: tuple[int, int, torch.dtype],
    formats: tuple[str, str],
    scores: bool,
    threads: int,
) -> None:
    dim, group, dtype = shape
    layout = layout_of(*formats, head_dim=dim, kv_heads=KV_HEADS, itemsize=dtype.itemsize)
    case = make_case(layout, group, dtype, scores=scores)
    softmax = Softmax(1.7 * dim**-0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layers = layer.DecodeLayers(case.tables)
        layers.begin(case.pages)
        for index in range(LAYERS):
            accum = None if not scores else case.tables.scores[index].clone()
            part = layers.attend(index, case.q, case.k, case.v, softmax)
            for raw, new in ((case.tables.keys, case.k), (case.tables.values, case.v)):
                assert torch.equal(raw[index].flatten(0, 1)[case.pages.rows], new)
            actual = None if accum is None else case.tables.scores[index].clone()
            if accum is not None:
                case.tables.scores[index].copy_(accum)
            expected = reference(case, index, softmax)
            tolerance = 3e-4 if isa == "avx512" else 1e-5
            assert part.out.dtype == dtype
            assert error_norm(part.out, expected.out) < tolerance + OUT[dtype]
            assert (part.lse - expected.lse).abs().max() < tolerance
            if accum is not None:
                gained = actual - accum, case.tables.scores[index] - accum
                assert error_norm(*gained) < tolerance
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    layout = layout_of(head_dim=64)
    tables = make_case(layout, 1, torch.float32).tables
    assert tables.sealed is not None
    strided = tables.sealed._replace(heads=tables.sealed.heads[:, ::2])
    with pytest.raises(ValueError, match="not contiguous"):
        layer.DecodeLayers(tables._replace(sealed=strided))
    with pytest.raises(ValueError, match="raw pages"):
        layer.DecodeLayers(tables._replace(keys=[x[:, :32] for x in tables.keys]))
    with pytest.raises(ValueError, match="raw pages"):
        layer.DecodeLayers(tables._replace(keys=[x.bfloat16() for x in tables.keys]))
