# SPDX-License-Identifier: Apache-2.0
"""The byte layout of sealed pages: sections fit, do not overlap, and no row straddles frames."""

import itertools

import pytest

from sglang_diffxkv.kernels.layout import (
    FORMATS,
    META_BYTES,
    PAGE_TOKENS,
    TOKEN_METADATA_BYTES,
    PageLayout,
    make_layout,
)

PAIRS = list(itertools.product(FORMATS, FORMATS))


def layout_of(head_dim: int, high: str, low: str, heads: int = 3) -> PageLayout:
    return make_layout(
        head_dim=head_dim,
        num_kv_heads=heads,
        raw_itemsize=2,
        high=FORMATS[high],
        low=FORMATS[low],
    )


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_sections_fit_their_page(head_dim: int, high: str, low: str) -> None:
    layout = layout_of(head_dim, high, low)
    h, lo = layout.high, layout.low
    assert layout.frame_bytes % layout.align == 0
    for n_high, n_low in itertools.product(range(0, PAGE_TOKENS + 1, 3), repeat=2):
        if n_high + n_low > PAGE_TOKENS:
            continue
        s = layout.sections(n_high, n_low)
        rows = (
            (s.key_high, n_high, layout.row_bytes(h.key_bits)),
            (s.value_high, n_high, layout.row_bytes(h.value_bits)),
            (s.key_low, n_low, layout.row_bytes(lo.key_bits)),
            (s.value_low, n_low, layout.row_bytes(lo.value_bits)),
            (s.meta_high, n_high, 0 if h.is_raw else META_BYTES),
            (s.meta_low, n_low, 0 if lo.is_raw else META_BYTES),
            (s.token_metadata, n_high + n_low, TOKEN_METADATA_BYTES),
        )
        end = 0
        for start, count, row in rows:
            assert start >= end
            if row:
                # rows start at multiples of their size, and so do frames
                assert start % row == 0 and layout.frame_bytes % row == 0
                assert layout.align % row == 0
            end = start + count * row
        assert end <= s.total <= layout.page_bytes // layout.num_kv_heads
        assert s.total % layout.align == 0
    assert layout.max_frames * layout.frame_bytes >= layout.page_bytes


def test_waste_of_a_typical_page_is_small() -> None:
    """Alignment of a head and the half-empty last frame: within 5 % at the paper's mix."""
    for head_dim, heads in ((128, 8), (128, 2), (64, 8)):
        layout = layout_of(head_dim, "K8V4", "K4V2", heads)
        tokens = 16 * layout.token_bytes(layout.high) + 32 * layout.token_bytes(layout.low)
        payload = heads * layout.sections(16, 32).total
        expected = payload + layout.frame_bytes / 2
        assert expected / (heads * tokens) < 1.05


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim 72"):
        layout_of(72, "K8V4", "K4V2")
