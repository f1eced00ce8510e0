# SPDX-License-Identifier: Apache-2.0
"""Which dtype a model is asked in, and bytes in terms of 16-bit elements."""

from pathlib import Path

import pytest
import torch

from sglang_diffxkv.config import DiffXKVConfig, Tiers
from sglang_diffxkv.eval import dtype
from sglang_diffxkv.eval.footprint import in_16_bit
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.eval.variants import served
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.pool.sealing import seal
from tests.support.pages import write
from tests.support.policies import Shape
from tests.support.stores import make_store

LAYERS, HEADS, DIM = 3, 2, 64


@pytest.mark.parametrize(("bfloat16", "expected"), [(1.0, "bfloat16"), (1.1, "float32")])
def test_a_cpu_is_asked_in_what_it_is_fast_at(monkeypatch, bfloat16, expected):
    seconds = {torch.bfloat16: bfloat16, torch.float32: 1.0}
    monkeypatch.setattr(dtype, "_product_seconds", seconds.__getitem__)
    assert dtype.fast_dtype("cpu") == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_is_asked_in_16_bit(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert dtype.fast_dtype("cuda") == expected


def test_measuring_takes_little_and_changes_nothing():
    threads = torch.get_num_threads()
    assert 0 < dtype._product_seconds(torch.float32) < 1
    assert torch.get_num_threads() == threads


def stats_of(policy: str, elements: torch.dtype, **config: object) -> dict:
    """Of a pool with four sealed pages and two raw ones."""
    shape = Shape(LAYERS, HEADS, DIM, elements)
    budget = (16 << 20) * elements.itemsize
    store = make_store(policy, budget, shape=shape, raw_share=0.5, **config)
    pages = torch.arange(1, 7)
    store.open(pages)
    generator = torch.Generator().manual_seed(0)
    slots = store.directory.raw_slot[pages].long()
    written = torch.randn(2, LAYERS, 6, PAGE_TOKENS, HEADS, DIM, generator=generator)
    for layer in range(LAYERS):
        store.raw.keys[layer][slots] = written[0, layer].to(elements)
        store.raw.values[layer][slots] = written[1, layer].to(elements)
    scores = torch.rand(LAYERS, 6, HEADS, PAGE_TOKENS, generator=generator)
    store.raw.scores[:, slots] = scores**4
    store.raw.counts[slots] = 8
    write(store, pages, torch.arange(6), torch.full((6,), 6 * PAGE_TOKENS), window=0)
    seal(store, pages[:4])
    return pool_stats(store)


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        ("diffkv", {}),
        ("uniform", {"tiers": Tiers(high="K4V4", low="K2V2")}),
        ("snapkv", {"layer_caps": 0.25}),
        ("lossless", {}),
    ],
)
def test_fp32_counts_as_16_bit_would(policy, config):
    """Of the same pages: the rest of the pool differs with its size."""
    wide, narrow = (stats_of(policy, e, **config) for e in (torch.float32, torch.bfloat16))
    model = Model(Path("m"), LAYERS, 0, HEADS, DIM, tokenizer=None, dtype="bfloat16")
    assert in_16_bit(narrow, model) is narrow
    found = in_16_bit(wide, model._replace(dtype="float32"))
    assert found["bytes_in_use"] == pytest.approx(narrow["bytes_in_use"], rel=0.06)
    assert found["physical_compression"] == pytest.approx(narrow["physical_compression"], rel=0.06)
    assert wide["bytes_in_use"] > 1.3 * found["bytes_in_use"]


def test_a_server_counts_compression_in_its_own_dtype():
    config = DiffXKVConfig(policy="diffxkv", target=4.0)
    assert served(config, 2) == config
    assert served(config, 4).target == 8
    # Of a retention, or where all that is kept is raw, the dtype makes no difference.
    for other in (
        DiffXKVConfig(policy="diffxkv", target=0.9),
        DiffXKVConfig(policy="xkv", target=4),
    ):
        assert served(other, 4) == other
