# SPDX-License-Identifier: Apache-2.0
"""Sealed prefixes that are unpacked for dense attention, against the naive float64 reference."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.extend import naive, prefill, scratch, triton, unpacked
from sglang_diffxkv.kernels.extend.prefill import PrefillBatch, SealedPrefill
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch, make_scratch, scratch_bytes
from sglang_diffxkv.kernels.extend.traits import Tile
from sglang_diffxkv.kernels.gpu.device import assumed_capability
from sglang_diffxkv.kernels.layout import (
    HIGH,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    head_records,
)
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pack import pack
from sglang_diffxkv.kernels.pages import OpenLists, Queries, SealedLists
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support import layouts
from tests.support.attention import assert_close, indptr, moved
from tests.support.device import DEVICE
from tests.support.fake_device import DEVICE as FAKE
from tests.support.fake_device import fake_device, waits
from tests.support.sealed import Sealed, random_tiers, seal

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 3e-6}
"""By the scratch's dtype. Triton's interpreter cuts bf16 off, which is twice as far from exact."""


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies fp16 slowly, and a tile as a whole."""

    def tile(dim: int, *_: object) -> Tile:
        return Tile(16, 32, 4, 1, peel=dim <= 128)

    monkeypatch.setattr(unpacked, "unpacked_tile", tile)


def layout_of(
    dim: int, tiers: tuple[str, str] = ("K8V4", "K4V2"), itemsize: int = 2, heads: int = 2
) -> PageLayout:
    return layouts.layout_of(*tiers, head_dim=dim, kv_heads=heads, itemsize=itemsize)


def small_scratch(
    layout: PageLayout, dtype: torch.dtype, pages: int, monkeypatch: pytest.MonkeyPatch
) -> PrefixScratch:
    """Room for so many pages, filled with NaN and nonsense."""
    monkeypatch.setattr(scratch, "MOST_TOKENS", pages * PAGE_TOKENS)
    made = make_scratch(layout, dtype, DEVICE)
    assert made.pages == pages and made.nbytes == scratch_bytes(layout)
    made.k.fill_(torch.nan)
    made.v.fill_(torch.nan)
    made.starts.fill_(-(2**40))
    return made


def random_part(t: int, heads: int, dim: int) -> AttentionState:
    """Attention over other tokens; over none for one of the queries."""
    part = AttentionState(torch.randn(t, heads, dim), 3 * torch.randn(t, heads))
    part.out[0], part.lse[0] = 0, -torch.inf
    return part


def asking(q: torch.Tensor, queries: torch.Tensor) -> Queries:
    """Queries of which sealed pages do not ask the positions."""
    return Queries(q, queries, torch.zeros(len(queries) - 1, dtype=torch.int32))


def prefill_batch(
    queries: torch.Tensor, sealed: SealedLists, new: list[int], prefix: list[int]
) -> PrefillBatch:
    """With sealed pages only."""
    none = torch.zeros(len(queries), dtype=torch.int32)
    opened = OpenLists(none, none[:0], none[:0])
    return PrefillBatch(queries, none[1:], opened, none[1:], sealed, new, prefix)


def check(
    q: torch.Tensor,
    queries: torch.Tensor,
    data: Sealed,
    lists: SealedLists,
    room: PrefixScratch,
    tolerance: float,
) -> None:
    """What is added to a part is what the reference computes."""
    before = random_part(*q.shape)
    args = (asking(q, queries), data.tables.listed(*lists), Softmax(q.shape[2] ** -0.5))
    expected = merge_states(before, naive.extend_sealed(*args))
    part = AttentionState(*(x.to(DEVICE, copy=True) for x in before))
    unpacked.extend_unpacked(part, *moved(args, DEVICE), room)
    assert_close(part, expected, tolerance)


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize(
    ("head_dim", "high", "low", "dtype", "group"),
    [
        *((dim, "K8V4", "K4V2", torch.bfloat16, 4) for dim in (64, 80, 96, 128, 256)),
        (80, "raw", "K8V8", torch.float32, 1),
        (128, "raw", "raw", torch.float16, 2),
        (64, "K4V4", "K2V2", torch.bfloat16, 7),
        (256, "K4V8", "K8V4", torch.float16, 3),
        (80, "raw", "K4V2", torch.bfloat16, 8),
        (256, "raw", "K4V2", torch.bfloat16, 1),
    ],
)
def test_unpacked(
    head_dim: int,
    high: str,
    low: str,
    dtype: torch.dtype,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged heads, some without tokens; sequences without pages or queries; several slices."""
    torch.manual_seed(head_dim + group)
    layout = layout_of(head_dim, (high, low), dtype.itemsize)
    tiers = random_tiers(head_dim, 6, 2)
    tiers[3:5, 1] = PRUNED
    data = seal(layout, pages=6, dtype=dtype, pack=pack, tiers=tiers).to(DEVICE)
    lists = SealedLists(
        indptr(4, 1, 0, 5, 2), torch.tensor([5, 0, 2, 1, 2, 0, 1, 2, 3, 4, 3, 4]).int()
    )
    q = torch.randn(11, 2 * group, head_dim).to(dtype)
    room = small_scratch(layout, dtype, 5, monkeypatch)
    tolerance = TOLERANCE[room.k.dtype]
    check(q, indptr(3, 0, 5, 1, 2), data, lists, room, tolerance)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pages", [4, 16])
def test_many_rows_and_full_tiles(
    capability: int, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a block and more tokens than a tile; queries strided as in a QKV row, fp32."""
    torch.manual_seed(pages)
    layout = layout_of(80)
    data = seal(layout, pages=6, dtype=torch.bfloat16, pack=pack, tiers=HIGH)
    q = torch.randn(50, 3 * 10 * 80)[:, 800:1600].view(50, 10, 80)
    lists = SealedLists(indptr(2, 0, 6, 1), torch.arange(9, dtype=torch.int32) % 6)
    room = small_scratch(layout, torch.bfloat16, pages, monkeypatch)
    with assumed_capability(capability):
        check(q, indptr(1, 0, 44, 5), data, lists, room, 1e-3)


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("multiprocessors", [9, 40])
@pytest.mark.parametrize("dim", [64, 80])
def test_splits(multiprocessors: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries: the tokens of a slice are shared by programs, some of which get none."""
    monkeypatch.setattr(unpacked, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(triton, "SPLIT_PAGES", 1)
    torch.manual_seed(multiprocessors)
    layout = layout_of(dim)
    data = seal(layout, pages=7, dtype=torch.bfloat16, pack=pack)
    q = torch.randn(5, 6, dim)
    lists = SealedLists(indptr(9, 1, 2, 0), torch.randint(0, 7, (12,), dtype=torch.int32))
    room = small_scratch(layout, torch.bfloat16, 8, monkeypatch)
    check(q, indptr(1, 0, 3, 1), data, lists, room, 1e-3)


def test_scores_far_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that fills up a tile may count as a score of 0."""
    torch.manual_seed(6)
    layout = layout_of(64, heads=1)
    k = 3 + torch.rand(3, PAGE_TOKENS, 1, 64)
    data = seal(layout, pages=3, dtype=torch.bfloat16, pack=pack, k=k)
    q = -30 + torch.randn(5, 3, 64)
    lists = SealedLists(indptr(3), torch.arange(3).int())
    room = small_scratch(layout, torch.bfloat16, 4, monkeypatch)
    # Exponents of hundreds leave the weights fewer exact bits.
    args = (asking(q, indptr(5)), data.tables.listed(*lists), Softmax(0.1))
    part = naive.empty_state(q)
    part = AttentionState(*(x.to(DEVICE) for x in part))
    unpacked.extend_unpacked(part, *moved(args, DEVICE), room)
    expected = naive.extend_sealed(*args)
    assert (expected.lse < -100).all()
    assert_close(part, expected, 5e-2)


@pytest.mark.parametrize("pages", [0, 1, 512, 1300])
def test_row_starts(pages: int) -> None:
    heads = head_records(*(torch.randint(0, n, (40, 3)) for n in (1000, 33, 32)))
    heads[5] = 0
    listed = torch.randint(0, 40, (pages,)).int()
    starts = torch.full((pages + 1, 3), -7)
    unpacked.count_rows(
        heads.int().to(DEVICE), listed.to(DEVICE), on_device := starts.to(DEVICE), 10**10
    )
    assert torch.equal(on_device.cpu(), naive.row_starts(heads, listed, 10**10))


NEW, PREFIX = [64, 3, 70, 1, 0], [256, 320, 0, 64, 130]
"""Of five sequences, two of which have pages to be unpacked, or would have."""


def sealed_batch(layout: PageLayout) -> tuple[Sealed, SealedLists, torch.Tensor]:
    """Pages of `PREFIX`, some of which are not sealed; page 0 has no tokens."""
    tiers = random_tiers(3, 9, layout.num_kv_heads)
    tiers[0] = PRUNED
    data = seal(layout, pages=9, dtype=torch.bfloat16, pack=pack, tiers=tiers)
    listed = torch.tensor([1, 2, 3, 8, 7, 6, 5, 4, 8, 2, 3]).int()
    lists = SealedLists(indptr(3, 5, 0, 1, 2), listed)
    return data, lists, torch.randn(sum(NEW), 4, layout.head_dim)


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("new", [NEW, [64, 64, 64, 64, 64], [9, 1, 63, 0, 5]])
def test_each_sequence_is_served_its_way(new: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways together are what either is, and the host waits for neither."""
    torch.manual_seed(1)
    layout = layout_of(64)
    data, lists, _ = sealed_batch(layout)
    q = torch.randn(sum(new), 4, 64)
    queries = indptr(*new)
    before = random_part(*q.shape)
    args = (asking(q, queries), data.tables.listed(*lists), Softmax(0.1))
    expected = merge_states(before, naive.extend_sealed(*args))
    monkeypatch.setattr(scratch, "MOST_TOKENS", 3 * PAGE_TOKENS)
    called = []
    for module, name in ((prefill, "extend_sealed"), (unpacked, "extend_slices")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name: called.append(name) or real(*a)
        )
    with fake_device():
        room = make_scratch(layout, torch.bfloat16, FAKE)
        batch, mine = moved((prefill_batch(queries, lists, new, PREFIX), args[0]), FAKE)
        with waits() as waited:
            step = SealedPrefill(batch, room)
            found = step.attend(mine, moved(data.tables, FAKE), Softmax(0.1))
            part = merge_states(moved(before, FAKE), found)
            assert waited == []
        part = AttentionState(*(x.cpu() for x in part))
    assert_close(part, expected, 1e-3)
    ways = [["extend_sealed", "extend_slices"], ["extend_slices"], ["extend_sealed"]]
    assert called == ways[[NEW, [64] * 5].index(new) if new in (NEW, [64] * 5) else 2]


def test_without_scratch_nothing_is_unpacked() -> None:
    lists = SealedLists(indptr(3), torch.arange(3).int())
    step = SealedPrefill(prefill_batch(indptr(1000), lists, [1000], [192]), None)
    assert step._unpacked is None and step._fused is lists


@pytest.mark.parametrize(
    ("heads", "dim", "tokens"), [(8, 128, 32768), (1, 128, 32768), (4, 128, 32768), (32, 80, 13056)]
)
def test_sizes(heads: int, dim: int, tokens: int) -> None:
    layout = layout_of(dim, heads=heads)
    made = make_scratch(layout, torch.bfloat16, "meta")
    assert made.pages * PAGE_TOKENS == tokens
    assert made.k.nbytes + made.v.nbytes == tokens * heads * dim * 4 <= 128 << 20
    assert made.nbytes == scratch_bytes(layout)
