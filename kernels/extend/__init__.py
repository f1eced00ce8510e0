# SPDX-License-Identifier: Apache-2.0
"""Attention of many new queries per sequence: over sealed pages, and over open (raw) pages.

The two parts of a sequence are disjoint and are merged by `attention_part.merge_parts`.
"""

from __future__ import annotations

from .open import extend_open
from .sealed import extend_sealed

__all__ = ["extend_open", "extend_sealed"]
