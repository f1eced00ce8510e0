# SPDX-License-Identifier: Apache-2.0
"""Packing, unpacking and copying rows in C++ (cpu.cpp)."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import pack as ops
from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, int64_words, table_words, threads
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pages import SealedTables

_pack = CFunction("pack", "diffxkv_pack")
_unpack = CFunction("pack", "diffxkv_unpack")
_copy_rows = CFunction("pack", "diffxkv_copy_rows")


@ops.pack.register("cpu")
def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    slots = raw.slots.long().contiguous()
    words = int64_words(
        *(word for x in (raw.keys, raw.values) for word in (x.data_ptr(), x.stride(0))),
        DTYPE_CODES[raw.keys.dtype],
        slots.data_ptr(),
        len(slots),
    )
    tiers, importance = (x.contiguous() for x in grades)
    _pack(table_words(tables), words, tiers.data_ptr(), importance.data_ptr(), threads())


@ops.unpack_into.register("cpu")
def unpack_into(
    tables: SealedTables, pages: torch.Tensor, rows: TokenRows, raw_dtype: torch.dtype
) -> None:
    pages, first = pages.long().contiguous(), rows.first.contiguous()
    metadata = 0 if rows.token_metadata is None else rows.token_metadata.data_ptr()
    words = int64_words(
        rows.keys.data_ptr(), rows.values.data_ptr(), metadata, DTYPE_CODES[rows.keys.dtype]
    )
    where = pages.data_ptr(), len(pages), first.data_ptr()
    _unpack(table_words(tables), *where, DTYPE_CODES[raw_dtype], words, threads())


@ops.copy_rows.register("cpu")
def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    old_tiers, new_tiers = old_tiers.contiguous(), new_tiers.contiguous()
    source = table_words(old), old_tiers.data_ptr()
    target = table_words(new), new_tiers.data_ptr()
    _copy_rows(*source, *target, len(old_tiers), threads())
