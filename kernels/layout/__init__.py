# SPDX-License-Identifier: Apache-2.0
"""The bytes of a sealed page: formats of tiers, sections, records of the directory, sizes."""

from sglang_diffxkv.kernels.layout.importance import decode_importance, encode_importance
from sglang_diffxkv.kernels.layout.measure import Measured, head_counts, head_records, measure
from sglang_diffxkv.kernels.layout.page import (
    FORMATS,
    FRAMES_PER_FULL_PAGE,
    HIGH,
    LOW,
    META_BYTES,
    PAGE_TOKENS,
    PRUNED,
    TOKEN_METADATA_BYTES,
    PageLayout,
    Sections,
    TierFormat,
    make_layout,
)

__all__ = [
    "FORMATS",
    "FRAMES_PER_FULL_PAGE",
    "HIGH",
    "LOW",
    "META_BYTES",
    "PAGE_TOKENS",
    "PRUNED",
    "TOKEN_METADATA_BYTES",
    "Measured",
    "PageLayout",
    "Sections",
    "TierFormat",
    "decode_importance",
    "encode_importance",
    "head_counts",
    "head_records",
    "make_layout",
    "measure",
]
