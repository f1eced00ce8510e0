# SPDX-License-Identifier: Apache-2.0
"""Sealing bytes: packing raw tokens into frames, and reading them back.

Implementations write the same bytes, bit for bit, and read the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, TOKEN_METADATA_BYTES, head_counts
from sglang_diffxkv.kernels.pages import SealedTables

__all__ = [
    "Grades",
    "RawTokens",
    "TokenRows",
    "Unpacked",
    "copy_rows",
    "pack",
    "unpack",
    "unpack_into",
]


class RawTokens(NamedTuple):
    """The tokens of S pages of one layer, full, as a raw tier would hold them.

    Attributes:
        keys, values: [R, 64, H, D], fp32, bf16 or fp16; pages may be strided, the rest is
            contiguous.
        slots: int32 or int64 [S], which of these R each page is.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


class Grades(NamedTuple):
    """What the tokens of S pages of one layer are worth keeping.

    Attributes:
        tiers: uint8 [S, H, 64], tier codes.
        importance: uint8 [S, H, 64], `encode_importance` codes.
    """

    tiers: torch.Tensor
    importance: torch.Tensor


class TokenRows(NamedTuple):
    """Where unpacked tokens go: one row a token and head, contiguous.

    Attributes:
        keys, values: [rows, D], fp32, bf16 or fp16.
        first: int64 [N, H], row of each (page, head)'s first token; the others follow.
        token_metadata: uint8 [rows, 2], position in the page and importance code; None: not wanted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: torch.Tensor
    token_metadata: torch.Tensor | None = None


class Unpacked(NamedTuple):
    """Dequantised pages of one layer in storage order: high tokens, then low, then zeros.

    Attributes:
        k, v: [N, H, 64, D] of the dtype asked for.
        position: uint8 [N, H, 64], position of each token in its page.
        importance: uint8 [N, H, 64], `encode_importance` codes.
        kept: bool [N, H, 64], whether the row holds a token; all else is 0 where not.
    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    importance: torch.Tensor
    kept: torch.Tensor


@operation
def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    """Write the payload of S pages of one layer into frames that are already allocated.

    Args:
        raw: of the model's dtype where a tier is raw.
        tables: of the S pages: enough frames, and heads as `measure` returned them for these tiers.
            The arena is written; bytes between sections are left as they are.

    Raises:
        ValueError: raw pages are not contiguous.
    """
    if not (raw.keys[:1].is_contiguous() and raw.values[:1].is_contiguous()):
        raise ValueError(f"strides of raw pages {raw.keys.stride()}, {raw.values.stride()}")
    pack.on(tables.arena)(raw, grades, tables)


@operation
def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    """Give tokens that have the same tier in both payloads the very codes and scales they had.

    Quantising a row that was read back may round it once more; this undoes that.

    Args:
        old: of S pages, read only; its arena must not be written by ``new``.
        new: packed already, of the same pages; the rows of these tokens are written again.
        old_tiers, new_tiers: uint8 [S, H, 64], tier codes.
    """
    copy_rows.on(new.arena)(old, old_tiers, new, new_tiers)


@operation
def unpack_into(
    tables: SealedTables, pages: torch.Tensor, rows: TokenRows, raw_dtype: torch.dtype
) -> None:
    """Dequantise N sealed pages of one layer into rows of the caller's choice.

    Args:
        pages: int32 or int64 [N], of the tables.
        rows: written; those that receive no token stay as they are.
        raw_dtype: dtype of the elements of raw tiers.
    """
    unpack_into.on(tables.arena)(tables, pages, rows, raw_dtype)


def unpack(
    tables: SealedTables, pages: torch.Tensor, dtype: torch.dtype, raw_dtype: torch.dtype
) -> Unpacked:
    """Dequantise N sealed pages of one layer, 64 rows to a head; arguments as in `unpack_into`.

    Args:
        dtype: dtype of k and v.
    """
    layout, arena = tables.layout, tables.arena
    n, h, d = len(pages), layout.num_kv_heads, layout.head_dim
    k, v = arena.new_zeros((2, n * h * PAGE_TOKENS, d), dtype=dtype)
    metadata = arena.new_zeros(n * h * PAGE_TOKENS, TOKEN_METADATA_BYTES)
    first = torch.arange(0, n * h * PAGE_TOKENS, PAGE_TOKENS, device=arena.device).view(n, h)
    unpack_into(tables, pages, TokenRows(k, v, first, metadata), raw_dtype)
    n_high, n_low = head_counts(tables.heads[pages])
    shape = (n, h, PAGE_TOKENS)
    position, importance = metadata.view(*shape, TOKEN_METADATA_BYTES).unbind(-1)
    kept = torch.arange(PAGE_TOKENS, device=arena.device) < (n_high + n_low)[..., None]
    return Unpacked(k.view(*shape, d), v.view(*shape, d), position, importance, kept)
