# SPDX-License-Identifier: Apache-2.0
"""Checks of decode: sealed, open and mixed pages, divided on the device as a server does it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu.device import kernels, to
from bench.gpu.inputs import Layers, Mix, draw_layers
from bench.gpu.verify.check import TOLERANCE, Check, Found, compare, is_timed, worst
from bench.gpu.verify.reference import Queries, decode_layer, merge64
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import naive
from sglang_diffxkv.kernels.decode.work import divide_open, divide_work
from sglang_diffxkv.kernels.extend import naive as extend
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages
from sglang_diffxkv.kernels.pages import Queries as NewTokens
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from tests.support import torch_pack
from tests.support.layouts import layout_of


class Case(NamedTuple):
    """Sequences of ``tokens`` tokens in two layers; the drops make them ragged.

    Attributes:
        drops: sealed pages that each sequence, by its number, does without.
        queries: new tokens of each sequence.
        cap: of the layers' scores; with one sealed keys lack no mean.
        sinks: whether the layers have them.
    """

    high: str = "K8V4"
    low: str = "K4V2"
    dim: int = 128
    kv_heads: int = 2
    group: int = 4
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 5 * PAGE_TOKENS
    open_pages: int = 2
    drops: tuple[int, ...] = (0, 2, 3)
    mix: Mix = Mix(25, 50, 25)
    queries: int = 1
    cap: float = 0.0
    sinks: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def softmax(self, device: torch.device, window_left: int = -1) -> Softmax:
        sinks = torch.randn(self.heads, device=device) if self.sinks else None
        return Softmax(self.dim**-0.5, self.cap, window_left, sinks)

    @property
    def timed(self) -> bool:
        return is_timed(self.dim, self.dtype, (self.high, self.low))

    @property
    def name(self) -> str:
        pages = f"{self.tokens // PAGE_TOKENS} pages, {self.open_pages} open"
        dtype = str(self.dtype).removeprefix("torch.")
        special = f", N={self.queries}" if self.queries > 1 else ""
        special += f", cap {self.cap:g}" if self.cap else ""
        special += ", sinks" if self.sinks else ""
        return (
            f"decode {self.high}/{self.low} D={self.dim} G={self.group} {dtype}, {pages}, "
            f"mix {self.mix.name}{special}"
        )


SMALL = (
    Case(),
    Case(open_pages=0, drops=(0, 5, 4)),
    Case("raw", "K4V2", dim=64, group=7, kv_heads=1),
    Case("K8V8", "K2V2", dim=80, group=1, kv_heads=3, dtype=torch.float16),
    Case(mix=Mix(0, 1, 99), dim=64, kv_heads=3),
    Case(queries=2),
    Case(queries=8, sinks=True),
    Case("raw", "K4V2", dim=64, group=5, kv_heads=1, queries=5),
    Case(dim=256, group=2, cap=3.0, kv_heads=1),
    Case(dim=80, group=3, cap=3.0, queries=3, sinks=True, dtype=torch.float16),
)
WINDOWS = (
    (100, Case(tokens=4 * PAGE_TOKENS, open_pages=4, drops=(0, 0), queries=3, sinks=True)),
    (63, Case(tokens=3 * PAGE_TOKENS, open_pages=3, drops=(0, 0), dim=256, group=2, cap=3.0)),
)
"""Windows of layers all of whose pages are open."""
LARGE = (
    Case(kv_heads=8, tokens=4096, drops=(0, 17, 61)),
    Case(kv_heads=1, group=8, tokens=16384, drops=(5, 200)),
    Case(kv_heads=4, group=7, tokens=2048, drops=(0, 3, 9, 29)),
    Case("K4V4", "K2V2", dim=96, kv_heads=4, group=2, tokens=1024),
    Case("K4V8", "K4V4", dim=256, kv_heads=2, tokens=1024),
    Case("raw", "raw", kv_heads=2, tokens=1024, drops=(0, 1, 2)),
)


def drop_pages(layers: Layers, drops: tuple[int, ...]) -> Layers:
    """Each sequence without some of its sealed pages, which are its first ones."""
    device, sequences = layers.arena.device, layers.sequences
    drop = torch.tensor(drops, dtype=torch.int32, device=device)
    bounds = layers.sealed_indptr.tolist()
    kept = [layers.sealed_pages[bounds[b] + n : bounds[b + 1]] for b, n in enumerate(drops)]
    lengths = torch.tensor([0, *(len(pages) for pages in kept)], device=device)
    return layers._replace(
        sequences=sequences._replace(first=sequences.first + drop, count=sequences.count - drop),
        sealed_indptr=lengths.cumsum(0).int(),
        sealed_pages=torch.cat(kept),
    )


def draw(case: Case, device: torch.device) -> Layers:
    """Two layers, packed by vectorised torch."""
    layout = layout_of(
        case.high, case.low, head_dim=case.dim, kv_heads=case.kv_heads,
        itemsize=case.dtype.itemsize,
    )  # fmt: skip
    layers = draw_layers(
        layout, case.mix, layers=2, batch=len(case.drops), tokens=case.tokens,
        open_pages=case.open_pages, dtype=case.dtype, device=device, pack=torch_pack.pack,
    )  # fmt: skip
    return drop_pages(layers, case.drops)


def naive_layer(layers: Layers, layer: int, queries: Queries) -> AttentionState:
    """The readable reference over both kinds of pages; each new token sees all sealed ones."""
    cpu = torch.device("cpu")
    q, q_sealed, softmax, key_mean = to(cpu, *queries)
    sequences = layers.sequences
    new, part = len(q) // len(sequences.count), softmax.of_part
    listed = layers.sealed_pages.split(layers.sealed_indptr.diff().tolist())
    listed = [pages for pages in listed for _ in range(new)]
    ends = torch.tensor([0, *map(len, listed)]).cumsum(0).int()
    sealed = layers.tables(layer).listed(ends, torch.cat(listed))
    found = naive.decode_sealed(q_sealed, *to(cpu, sealed), part)
    if key_mean is not None:
        found = from_sealed(found, q, key_mean, part)
    if sequences.raw_slot is not None:
        found = merge64([found, naive_open(layers, layer, q, part)])
    return add_sinks(found, softmax.sinks)


def naive_open(layers: Layers, layer: int, q: torch.Tensor, softmax: Softmax) -> AttentionState:
    """The readable reference over open pages; positions are of the first one on."""
    sequences = layers.sequences
    assert sequences.raw_slot is not None
    slots, indptr = [], [0]
    for first, count in zip(sequences.first.tolist(), sequences.count.tolist(), strict=True):
        mine = sequences.raw_slot[sequences.pages[first : first + count].long()]
        slots.append(mine[mine >= 0])
        indptr.append(indptr[-1] + len(slots[-1]))
    position = torch.cat([torch.arange(len(x)) for x in slots]).int()
    lists = torch.tensor(indptr, dtype=torch.int32), torch.cat(slots), position
    opened = OpenPages(layers.k_raw[layer], layers.v_raw[layer], *lists)
    new = len(q) // len(slots)
    pages = torch.tensor([len(x) for x in slots])
    ends = (pages - 1) * PAGE_TOKENS + sequences.last_len.cpu()
    asking = NewTokens(q, torch.arange(0, len(q) + 1, new), ends - new)
    return extend.extend_open(asking, *to(torch.device("cpu"), opened), softmax)


def check(case: Case, device: torch.device, *, large: bool) -> Found:
    """Both layers, divided at once; queries of sealed and of open pages differ.

    In the second layer what is found in sealed pages comes back from their basis.
    """
    layers = draw(case, device)
    triton, softmax = kernels("decode"), case.softmax(device)
    shape = (2, len(case.drops) * case.queries, case.heads, case.dim)
    q, q_sealed = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    work = divide_work(layers.sequences, layers.heads, layers.layout)
    found = []
    reference = decode_layer if large else naive_layer
    mean = torch.randn(case.kv_heads, case.dim, device=device)
    for layer, key_mean in enumerate((None, mean if not case.cap else torch.zeros_like(mean))):
        pages, mine = layers.pages(layer, key_mean), work.layer(layer)
        part = triton.attend(q[layer], q_sealed[layer], pages, mine, softmax)
        queries = Queries(q[layer], q_sealed[layer], softmax, key_mean)
        expected = reference(layers, layer, queries)
        found.append(compare(part, expected))
    return worst(found)


def check_window(window_left: int, case: Case, device: torch.device) -> Found:
    """A layer that none of whose pages is sealed, and of whose tokens some are out of sight."""
    layers, softmax = draw(case, device), case.softmax(device, window_left)
    shape = len(case.drops) * case.queries, case.heads, case.dim
    q = torch.randn(shape, device=device).to(case.dtype)
    pages = LayerPages.of_open(layers.k_raw[0], layers.v_raw[0])
    work = divide_open(layers.sequences, pages.tables.layout)
    found = kernels("decode").attend(q, q, pages, work, softmax)
    return compare(found, naive_layer(layers, 0, Queries(q, q, softmax)))


def check_public(device: torch.device) -> Found:
    """`decode_sealed`, which divides its own work."""
    case = Case(open_pages=0, drops=(1, 0, 5), group=5)
    layers = draw(case, device)
    q = torch.randn(3, 10, case.dim, device=device).to(case.dtype)
    part = kernels("decode").decode_sealed(q, layers.sealed(0), Softmax(0.1))
    return compare(part, naive_layer(layers, 0, Queries(q, q, Softmax(0.1))))


def check_open(device: torch.device) -> Found:
    """`decode_open` alone: no page is sealed."""
    case = Case(tokens=3 * PAGE_TOKENS, open_pages=3, drops=(0, 0, 0))
    layers = draw(case, device)
    sequences = layers.sequences
    assert sequences.raw_slot is not None
    slots = sequences.raw_slot[sequences.pages.long()]
    indptr = torch.arange(4, dtype=torch.int32, device=device) * 3
    q = torch.randn(3, 8, case.dim, device=device).to(case.dtype)
    position = torch.arange(9, dtype=torch.int32, device=device) % 3
    opened = OpenPages(layers.k_raw[0], layers.v_raw[0], indptr, slots, position)
    args = (q, opened, sequences.last_len, Softmax(0.1))
    expected = naive.decode_open(*to(torch.device("cpu"), *args))
    return compare(kernels("decode").decode_open(*args), expected)


def checks(large: bool) -> Iterator[Check]:
    yield Check("decode_sealed", "decode", TOLERANCE, check_public, timed=True)
    yield Check("decode_open", "decode", TOLERANCE, check_open, timed=True)
    for case in SMALL:
        run = partial(check, case, large=False)
        yield Check(case.name, "decode", TOLERANCE, run, case.timed)
    for window_left, case in WINDOWS:
        run = partial(check_window, window_left, case)
        yield Check(f"{case.name}, window {window_left}", "decode", TOLERANCE, run, case.timed)
    for case in LARGE if large else ():
        run = partial(check, case, large=True)
        yield Check(case.name, "decode", TOLERANCE, run, case.timed)
