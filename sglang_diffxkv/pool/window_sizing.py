# SPDX-License-Identifier: Apache-2.0
"""How much of the memory the layers get that see a window only, in SGLang's own pool for them."""

from __future__ import annotations

from typing import NamedTuple

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

TYPICAL_TOKENS = 2048
"""Of a request, for the division of memory: as many in full-attention layers for each window, and
the two pages that it begins and ends in, in the others. Shorter requests need more for windows,
which are given up first where they are short: those at the end of cached prefixes."""
MOST_FOR_CHUNKS = 0.5
"""Of all memory at most, to have room for the chunks of prompts that are prefilled at once."""
FEW_REQUESTS = 2
"""That run beside these chunks at least."""
SLOT_BYTES = 8
"""SGLang's allocator of such pools keeps, for each token slot, an int64: where its window layers'
K/V is."""


class WindowLayers(NamedTuple):
    """A model's layers with a sliding window.

    Attributes:
        layers: how many.
        token_bytes: of one token's K/V in all of them.
        window_left: tokens before its own that a query sees.
        least: tokens, to run `FEW_REQUESTS`, and the chunks that are prefilled meanwhile.
        ratio: tokens of their pool for each that the full-attention layers are expected to hold,
            as the user wants it; None: by `TYPICAL_TOKENS`.
    """

    layers: int
    token_bytes: int
    window_left: int
    least: int
    ratio: float | None = None


def size_window_pool(
    windows: WindowLayers, nbytes: int, full_token_bytes: float, most: int | None
) -> int:
    """Tokens of the window layers' pool, in whole pages.

    Args:
        nbytes: memory for all layers.
        full_token_bytes: what a token is expected to take in the full-attention layers.
        most: tokens that there can be at all (``--max-total-tokens``).

    Raises:
        ValueError: it could not hold one request.
    """
    ratio = windows.ratio
    if ratio is None:
        ratio = min(1.0, (windows.window_left + 1 + 2 * PAGE_TOKENS) / TYPICAL_TOKENS)
    tokens = ratio * nbytes / (full_token_bytes + ratio * windows.token_bytes)
    chunks = min(windows.least, MOST_FOR_CHUNKS * nbytes / windows.token_bytes)
    wanted = max(tokens, chunks)
    if most is not None:
        wanted = min(wanted, -(-most // PAGE_TOKENS) * PAGE_TOKENS)
    pages = int(wanted) // PAGE_TOKENS
    # As SGLang, which admits nobody where the pool has no page beyond one window and one page.
    least = (windows.window_left + PAGE_TOKENS) // PAGE_TOKENS + 1
    if pages < least:
        raise ValueError(
            f"diffxkv: {pages * PAGE_TOKENS} tokens of window layers are less than a window of "
            f"{windows.window_left + 1} and a page: raise memory_bytes (or --mem-fraction-static, "
            "--max-total-tokens or --swa-full-tokens-ratio)"
        )
    return pages * PAGE_TOKENS
